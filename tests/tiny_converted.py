"""A tiny model in Meta's files with its tokenizer, and converted: random weights, but all that a checkpoint has."""

from __future__ import annotations

from pathlib import Path

from llama_tp.checkpoint.convert import convert
from tests.tiny_checkpoint import meta_tensors, write_meta
from tests.tiny_text import make_sentencepiece_model


def write_originals(folder: Path, num_shards: int = 1) -> Path:
    """The folder, with what Meta ships."""
    write_meta(folder, meta_tensors(), num_shards)
    make_sentencepiece_model(folder)
    return folder


def convert_beside(originals: Path, **options: int) -> Path:
    """Convert them to `converted`, and write model_args.json, both beside the originals. The checkpoint."""
    converted = originals.with_name("converted")
    tokenizer, args = originals / "tokenizer.model", originals.with_name("model_args.json")
    convert(str(originals), str(tokenizer), None, str(converted), model_args_path=str(args), **options)
    return converted
