"""The served form as a CheckpointReader: the way back to other formats, and to what `inspect` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.dcp_metadata import METADATA, load_metadata
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.verify import verify
from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes

MODEL_ARGS = "model_args.json"


def is_stored(path: str | Path) -> bool:
    """Whether this is the folder of a converted checkpoint, complete or not."""
    return Path(path, METADATA).is_file()


class StoredReader:
    """A CheckpointReader of a converted checkpoint, on this process alone.

    When it is made, the folder passes the quick check against its manifest, which hashes all small files. Large ones
    are hashed while they are read, inside of `verification`: what was read is good once its `finish` has returned.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = verify(self.folder, full=False)
        metadata = load_metadata(self.folder, self.manifest.files.keys())
        if MODEL_ARGS not in self.manifest.files:
            raise ValueError(f"{self.folder}: the manifest does not list {MODEL_ARGS}; convert the originals again")
        self.args = ModelArgs.load_converted(self.folder / MODEL_ARGS)
        shapes = weight_shapes(self.args)
        dcp.check_shapes(metadata, shapes, self.folder)
        stored = dcp.tensors_of(metadata)
        self.dtype = stored["tok_embeddings.weight"].properties.dtype
        if odd := [name for name in shapes if stored[name].properties.dtype != self.dtype]:
            raise ValueError(f"{self.folder}: {odd[0]} is {stored[odd[0]].properties.dtype}, expected {self.dtype}")
        self.files = [self.folder / name for name in self.manifest.files if name.endswith(".distcp")]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = self.manifest.about
        self.tensors: Mapping[str, TensorSource] = {
            name: ChunkedTensor(self.folder, name, shape, self.dtype, metadata) for name, shape in shapes.items()
        }

    def verification(self) -> LoadVerification:
        """The context to read in, whose `finish` raises ValueError for a file that is not that of the manifest."""
        return LoadVerification(self.folder, "once", num_threads=dcp.load_threads())


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A TensorSource over the chunks of one stored tensor."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    metadata: Metadata = field(repr=False)

    def read(self, dim: int, start: int, length: int) -> Tensor:
        return dcp.read_slice(self.folder, self.metadata, self.name, dim, start, length)
