"""The served form as a CheckpointReader: the way back to other formats, and to what `inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.checkpoint.store.dcp import METADATA
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.reading import Slices, StoredFiles
from llama_tp.checkpoint.store.table import StoredTensor, check_shapes
from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes

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
        shapes = weight_shapes(self.args)
        check_shapes(self.stored.tensors, shapes, self.folder)
        self.dtype = self.stored.dtype
        if odd := [name for name in shapes if self.stored.tensors[name].dtype != self.dtype]:
            raise ValueError(f"{self.folder}: {odd[0]} is {self.stored.tensors[odd[0]].dtype}, expected {self.dtype}")
        self.files = [self.folder / name for name in self.manifest.files if name.endswith(".distcp")]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = self.manifest.about
        self.tensors: Mapping[str, TensorSource] = {
            name: ChunkedTensor(self.stored, name, self.stored.tensors[name]) for name in shapes
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
        target = torch.empty(shape, dtype=self.dtype)
        self.files.read({self.name: Slices(dim, [(range(start, start + length), target)], self.shape)})
        return target
