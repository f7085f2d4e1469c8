"""The served form as a CheckpointReader: the way back to other formats, and to what `inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import QuantizedSource, TensorSource
from llama_tp.checkpoint.store.dcp import METADATA
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.reading import Slices, StoredFiles, check_model
from llama_tp.checkpoint.store.table import StoredTensor, dtype_name
from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.weights import Form, Quantized, weight_shapes
from llama_tp.model_args import ModelArgs

MODEL_ARGS = "model_args.json"


def is_stored(path: str | Path) -> bool:
    """Whether this is the folder of a converted checkpoint, complete or not."""
    return Path(path, METADATA).is_file()


class StoredReader:
    """A CheckpointReader of a converted checkpoint, on this process alone.

    When it is made, the folder passes the quick check against its manifest, which hashes all small files. Large ones
    are hashed while they are read, inside of `reading`: what was read is good once its `finish` has returned.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.stored = StoredFiles(folder)
        self.manifest = self.stored.manifest
        if MODEL_ARGS not in self.manifest.files:
            raise ValueError(f"{self.folder}: the manifest does not list {MODEL_ARGS}; convert the originals again")
        self.args = ModelArgs.load_converted(self.folder / MODEL_ARGS)
        check_model(self.stored, self.args)
        self.dtype = self.stored.dtype
        self.quantized: Mapping[str, QuantizedSource] = {
            module: StoredQuantized(self.stored, module, one)
            for module, one in self.stored.formats.items()
            if isinstance(one, Quantized)
        }
        names = [name for name in weight_shapes(self.args) if name.removesuffix(".weight") not in self.quantized]
        if odd := [name for name in names if self.stored.tensors[name].dtype != self.dtype]:
            found = dtype_name(self.stored.tensors[odd[0]].dtype)
            raise ValueError(f"{self.folder}: {odd[0]} is {found}, expected {dtype_name(self.dtype)}")
        self.files = [self.folder / name for name in self.manifest.files if name.endswith(".distcp")]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = self.manifest.about
        self.tensors: Mapping[str, TensorSource] = {
            name: ChunkedTensor(self.stored, name, self.stored.tensors[name]) for name in names
        }

    @contextmanager
    def reading(self) -> Iterator[LoadVerification]:
        """The context to read in. ValueError from the verification's `finish` for a file that is not that of the
        manifest."""
        with self.stored, LoadVerification(self.folder, "once") as verification:
            yield verification


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A TensorSource over the chunks of one stored tensor."""

    files: StoredFiles = field(repr=False)
    name: str
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        shape = [length if at == dim else size for at, size in enumerate(self.shape)]
        target = self.files.memory.tensor(shape, self.dtype)
        self.files.read({self.name: Slices(dim, [(range(start, start + length), target)], self.shape)})
        return target


@dataclass(frozen=True, slots=True)
class StoredQuantized:
    """A QuantizedSource over the stored parameters of one layer."""

    files: StoredFiles = field(repr=False)
    module: str
    format: Quantized

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.files.tensors[f"{self.module}.weight"].shape
        return rows, columns if self.form != "int4" else 2 * columns

    @property
    def form(self) -> Form:
        return self.format.name

    @property
    def offsets_dtype(self) -> torch.dtype:
        return torch.float32 if self.format.offsets == "float32" else torch.float16

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        parts = {}
        for kind in self.format.parameters(*self.shape):
            tensor = ChunkedTensor(self.files, f"{self.module}.{kind}", self.files.tensors[f"{self.module}.{kind}"])
            if dim == 0 or kind == "row_scales":
                parts[kind] = tensor.read(0, *((start, length) if dim == 0 else (0, self.shape[0])))
            else:
                per_entry = self.shape[1] // tensor.shape[1]
                parts[kind] = tensor.read(1, start // per_entry, length // per_entry)
        scales = parts["row_scales" if self.form == "int8" else "scales"]
        return QuantizedWeight(parts["weight"], scales, parts.get("offsets"))
