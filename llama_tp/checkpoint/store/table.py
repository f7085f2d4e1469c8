"""tensors.json: dtype and shape of every tensor, and where its bytes are.

This is all that loading needs, so no file of a checkpoint is ever unpickled. DCP's own index, `.metadata`, says the
same to PyTorch's reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_tp.checkpoint.store.manifest import Manifest
from llama_tp.model.weights import Shapes

TABLE = "tensors.json"


def dtype_name(dtype: torch.dtype) -> str:
    """Such as bfloat16."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8)
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Adjacent entries of a tensor along one dim, row by row without gaps."""

    file: str
    offset: int
    """Of the first byte in the file."""
    start: int
    """The first entry."""
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, cut along one dim."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    chunks: tuple[StoredChunk, ...]
    """In ascending order, without gaps."""

    def chunk_shape(self, chunk: StoredChunk) -> tuple[int, ...]:
        return tuple(chunk.length if dim == self.dim else size for dim, size in enumerate(self.shape))

    def chunk_bytes(self, chunk: StoredChunk) -> int:
        return math.prod(self.chunk_shape(chunk)) * self.dtype.itemsize


Table = dict[str, StoredTensor]
"""All tensors of a checkpoint, by name."""


def write_table(folder: str | Path, table: Mapping[str, StoredTensor]) -> None:
    """Write tensors.json; the manifest, which is written later, has its hash."""
    content = {
        name: {
            "dtype": dtype_name(tensor.dtype),
            "shape": tensor.shape,
            "dim": tensor.dim,
            "chunks": [[chunk.file, chunk.offset, chunk.start, chunk.length] for chunk in tensor.chunks],
        }
        for name, tensor in table.items()
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in content.items())
    (Path(folder) / TABLE).write_text(f"{{\n{lines}\n}}\n")


def load_table(folder: str | Path, manifest: Manifest) -> Table:
    """Read tensors.json. ValueError for anything but whole tensors inside of the files of `manifest`."""
    path = Path(folder) / TABLE
    if TABLE not in manifest.files:
        raise ValueError(f"{path} is not in the manifest of {folder}; convert the originals again")
    try:
        table = {name: _tensor(one) for name, one in json.loads(path.read_bytes()).items()}
        for name, tensor in table.items():
            _check(name, tensor, manifest)
        return table
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not the table of a checkpoint: {type(error).__name__}: {error}") from None


def check_shapes(table: Table, wanted: Mapping[str, tuple[int, ...]] | Shapes, folder: str | Path) -> None:
    """ValueError unless the checkpoint has exactly these tensors."""
    problems = [f"{name} is not in the checkpoint" for name in sorted(wanted.keys() - table.keys())]
    problems += [f"{name} is in the checkpoint but not in the model" for name in sorted(table.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & table.keys()):
        if (shape := table[name].shape) != wanted[name]:
            problems.append(f"{name} has shape {shape} in the checkpoint, {wanted[name]} in the model")
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError(f"{folder} does not contain this model: {'; '.join(problems[:4])}{more}")


def _tensor(content: Any) -> StoredTensor:
    chunks = tuple(StoredChunk(str(file), *map(int, place)) for file, *place in content["chunks"])
    return StoredTensor(_DTYPES[content["dtype"]], tuple(map(int, content["shape"])), int(content["dim"]), chunks)


def _check(name: str, tensor: StoredTensor, manifest: Manifest) -> None:
    if not 0 <= tensor.dim < len(tensor.shape) or min(tensor.shape) < 1:
        raise ValueError(f"{name} has shape {tensor.shape}, and is cut along dim {tensor.dim}")
    end = 0
    for chunk in tensor.chunks:
        if chunk.start != end or chunk.length < 1:
            raise ValueError(f"{name} has a gap or an overlap at {chunk.start}")
        end += chunk.length
        if chunk.file not in manifest.files:
            raise ValueError(f"{name} is in {chunk.file!r}, which is not in the manifest")
        if not 0 <= chunk.offset <= manifest.files[chunk.file].size - tensor.chunk_bytes(chunk):
            raise ValueError(f"{name} is outside of {chunk.file}")
    if end != tensor.shape[tensor.dim]:
        raise ValueError(f"{name} is incomplete")
