"""The writer of a checkpoint in a foreign format: the counterpart of `open`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from llama_tp.checkpoint.formats.fairscale_writer import FairscaleWriter
from llama_tp.checkpoint.formats.huggingface_writer import HuggingFaceWriter
from llama_tp.checkpoint.formats.reader import CheckpointReader
from llama_tp.checkpoint.progress import Advance
from llama_tp.checkpoint.store.manifest import FileEntry
from llama_tp.text.tokenizer import Tokenizer

FORMATS = ("meta", "hf")


class CheckpointWriter(Protocol):
    """Writes one model, about which everything was checked when the writer was made."""

    def write(self, folder: Path, advance: Advance) -> Mapping[str, FileEntry]:
        """Write all but the tokenizer into a folder that holds the tokenizer already. Size and hash of large files."""
        ...


def make_writer(
    kind: str, reader: CheckpointReader, tokenizer: Tokenizer | None, model_parallel_size: int | None
) -> CheckpointWriter:
    """One that writes a model in one of FORMATS. ValueError names what of the model the format cannot express.

    `model_parallel_size`: the number of shards, for Meta's format alone. None: 1.
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r} must be one of {', '.join(FORMATS)}")
    if isinstance(model_parallel_size, bool) or not isinstance(model_parallel_size, int | None):
        raise ValueError(f"model_parallel_size={model_parallel_size!r} must be an integer")
    if kind == "meta":
        return FairscaleWriter(reader, tokenizer, 1 if model_parallel_size is None else model_parallel_size)
    if model_parallel_size is not None:
        raise ValueError(f"model_parallel_size={model_parallel_size} is for --format meta only; leave it out")
    return HuggingFaceWriter(reader, tokenizer)
