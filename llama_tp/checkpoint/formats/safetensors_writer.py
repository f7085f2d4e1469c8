"""Writes a safetensors file tensor after tensor: the package's own writer takes all tensors of a file at once.

The format is 8 bytes with the length of the header, little-endian; the header, JSON that says dtype, shape and offsets
of every tensor, padded with spaces; then the bytes of the tensors, one after the other
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.safetensors_files import DTYPES
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.manifest import FileEntry

_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """One tensor of a file that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, layouts: Mapping[str, Layout], blocks: Iterable[Tensor]) -> FileEntry:
    """`blocks` are the rows of the tensors in order, in pieces of whatever size. Holds one of them."""
    with HashingFile(path) as file:
        file.write(_header(layouts))
        end = file.size + sum(layout.nbytes for layout in layouts.values())
        for block in blocks:
            file.write(block.contiguous().flatten().view(torch.uint8).numpy())
        assert file.size == end, path
    return file.entry


def split_into_files(layouts: Mapping[str, Layout], max_bytes: int) -> Iterator[dict[str, Layout]]:
    """Group consecutive tensors up to the size limit; a larger tensor gets a file of its own."""
    part: dict[str, Layout] = {}
    for name, layout in layouts.items():
        if part and sum(one.nbytes for one in part.values()) + layout.nbytes > max_bytes:
            yield part
            part = {}
        part[name] = layout
    yield part


def _header(layouts: Mapping[str, Layout]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to know
    start = 0
    for name, layout in layouts.items():
        offsets = [start, start := start + layout.nbytes]
        entries[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header
