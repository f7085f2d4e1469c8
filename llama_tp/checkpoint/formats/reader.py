"""The interface of every source of weights: the architecture, and tensors that are read a slice at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_tp.config import ModelArgs


class TensorSource(Protocol):
    """One full (unsharded) tensor that is not in memory yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, dim: int, start: int, length: int) -> Tensor:
        """`length` entries of dimension `dim` from `start`. May be a view of a mapped file: do not write to it."""
        ...


class CheckpointReader(Protocol):
    """A whole model in Meta's names. Memory is bounded by what one `read` returns, not by the model."""

    @property
    def args(self) -> ModelArgs:
        """The architecture, with `vocab_size` and `tied_embeddings` from the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding. The other tensors may have others: see `cast.in_one_dtype`."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSource]: ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the weights."""
        ...

    @property
    def expected_md5s(self) -> Mapping[Path, frozenset[str]]:
        """Published md5 sums, in hex, of some or all of `files`; not compared yet."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """The description of the source in a converted checkpoint's manifest."""
        ...


def num_bytes(reader: CheckpointReader) -> int:
    """Of all tensors."""
    return sum(math.prod(source.shape) * source.dtype.itemsize for source in reader.tensors.values())


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A TensorSource over a tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        return self.tensor.narrow(dim, start, length)


@dataclass(frozen=True, slots=True)
class MemoryReader:
    """A CheckpointReader over full tensors in memory: random weights, tests."""

    args: ModelArgs
    dtype: torch.dtype
    tensors: Mapping[str, TensorSource]
    files: Sequence[Path] = ()
    expected_md5s: Mapping[Path, frozenset[str]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=lambda: {"source": "memory"})

    @classmethod
    def of(cls, args: ModelArgs, tensors: Mapping[str, Tensor]) -> MemoryReader:
        """A reader of a state dict whose tensors all have the same dtype."""
        sources = {name: MemoryTensor(tensor) for name, tensor in tensors.items()}
        return cls(args, next(iter(sources.values())).dtype, sources)
