"""DCP's `.metadata`, a pickle: read by an unpickler restricted to DCP's own classes, then checked entry by entry."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint."
_KNOWN = {
    f"{_DCP}metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}filesystem": {"_StorageInfo"},
    "torch": {"Size", "bfloat16", "float16", "float32"},
    "torch.serialization": {"_get_layout"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Dotted names could reach through a known class to anything its module imports.
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it needs {module}.{name}, which checkpoints never need")


def load_metadata(folder: Path, files: Collection[str]) -> Metadata:
    """Read `.metadata`. ValueError for anything but complete tensors with all their chunks in `files`."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {folder} is not a checkpoint") from None
    # A hostile pickle can make the unpickler fail in any way.
    except Exception as error:
        raise ValueError(f"{path} is refused, nothing in it was executed: {error}") from None
    try:
        _check(metadata, {name: (folder / name).stat().st_size for name in files})
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is not the metadata of a converted checkpoint: {error}") from None
    return metadata


def _check(metadata: Any, sizes: dict[str, int]) -> None:
    _require(type(metadata) is Metadata, "it is not a Metadata object")
    _require(
        type(metadata.state_dict_metadata) is dict and bool(metadata.state_dict_metadata), "it contains no tensors"
    )
    for name, tensor in metadata.state_dict_metadata.items():
        _require(type(name) is str, f"{name!r} is not a name")
        _require(type(tensor) is TensorStorageMetadata, f"{name} is a {type(tensor).__name__}, only tensors are loaded")
        _require(type(tensor.properties) is TensorProperties, f"{name} has no dtype")
        _require(isinstance(tensor.properties.dtype, torch.dtype), f"{name} has no dtype")
        _check_chunks(name, tensor)
    chunks = {(name, chunk.offsets) for name, tensor in metadata.state_dict_metadata.items() for chunk in tensor.chunks}
    _require(
        {(index.fqn, index.offset) for index in metadata.storage_data} == chunks, "chunks and storage do not match"
    )
    for index, info in metadata.storage_data.items():
        _require(info.relative_path in sizes, f"{index.fqn} is in {info.relative_path!r}, which is not in the manifest")
        # An extension could select a different decoder.
        _require(getattr(info, "transform_descriptors", None) is None, f"{index.fqn} needs an extension")
        inside = info.offset >= 0 and info.length > 0 and info.offset + info.length <= sizes[info.relative_path]
        _require(inside, f"{index.fqn} is outside {info.relative_path}")


def _check_chunks(name: str, tensor: TensorStorageMetadata) -> None:
    """Chunks must tile the tensor along one dim: a gap would leave parts of the target unset."""
    _require(type(tensor.chunks) is list and bool(tensor.chunks), f"{name} has no chunks")
    for chunk in tensor.chunks:
        _require(type(chunk) is ChunkStorageMetadata, f"{name} has a bad chunk")
        _require(
            len(chunk.offsets) == len(chunk.sizes) == len(tensor.size),
            f"{name} has a chunk of different rank",
        )
    dims = [
        dim for dim in range(len(tensor.size)) if any(chunk.sizes[dim] != tensor.size[dim] for chunk in tensor.chunks)
    ]
    _require(len(dims) <= 1, f"{name} is split along several dims")
    end = 0
    for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets):
        start = [end if dim in dims else 0 for dim in range(len(tensor.size))]
        _require(list(chunk.offsets) == start, f"{name} has a gap or an overlap at {tuple(chunk.offsets)}")
        end += chunk.sizes[dims[0]] if dims else 0
    whole = end == tensor.size[dims[0]] if dims else len(tensor.chunks) == 1
    _require(whole, f"{name} is incomplete")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
