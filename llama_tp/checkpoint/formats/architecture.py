"""The architecture in a JSON file, whoever wrote it: Meta's or Mistral AI's params.json, Hugging Face's config.json, or
the model_args.json of a conversion."""

from __future__ import annotations

from pathlib import Path

from llama_tp.checkpoint.formats.huggingface_config import read_config, read_object
from llama_tp.checkpoint.formats.params import read_params
from llama_tp.model_args import ModelArgs


def read_architecture(path: str | Path) -> ModelArgs:
    """The architecture. ValueError names the file and what is wrong with it, also if it lacks the vocabulary's size."""
    path = Path(path)
    if "architectures" in read_object(path):
        return read_config(path)[1]
    args = read_params(path)
    if args.vocab_size < 1:
        raise ValueError(f"{path}: vocab_size={args.vocab_size} does not give the vocabulary size; set it in the file")
    return args
