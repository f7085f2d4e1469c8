"""The interface of every source of weights: the architecture, and tensors that are read a slice at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.weights import Form
from llama_tp.model_args import ModelArgs


class TensorSource(Protocol):
    """One full (unsharded) tensor that is not in memory yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, dim: int, start: int, length: int) -> Tensor:
        """`length` entries of dimension `dim` from `start`. May be a view of a mapped file: do not write to it."""
        ...


BLOCK_BYTES = 64 << 20
"""Approximate size of a block of rows: enough for several threads to read."""


def blocks_of_rows(source: TensorSource, start: int, length: int, unit: int = 1) -> Iterator[Tensor]:
    """`length` rows from `start`, a few at a time: a multiple of `unit`, but for the last ones."""
    row_bytes = math.prod(source.shape[1:]) * source.dtype.itemsize
    size = unit * max(1, BLOCK_BYTES // (unit * row_bytes))
    for first in range(start, start + length, size):
        yield source.read(0, first, min(size, start + length - first))


class QuantizedSource(Protocol):
    """One full (unsharded) quantized matrix that is not in memory yet."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        ...

    @property
    def form(self) -> Form: ...

    @property
    def offsets_dtype(self) -> torch.dtype:
        """Of int4: float16 or float32."""
        ...

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """`length` rows (dim 0) or columns (dim 1, both multiples of 32) from `start`. Every read of a matrix gives
        tensors of the same dtypes. ValueError if the file holds numbers that the form cannot."""
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
    def tensors(self) -> Mapping[str, TensorSource]:
        """All weights and biases that are not quantized."""
        ...

    @property
    def quantized(self) -> Mapping[str, QuantizedSource]:
        """The weights of quantized linear layers, by their modules' names. Layers that are computed as one (`FUSED`)
        have the same format."""
        ...

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
class DerivedReader:
    """A CheckpointReader made from the parts of another."""

    args: ModelArgs
    dtype: torch.dtype
    tensors: Mapping[str, TensorSource]
    quantized: Mapping[str, QuantizedSource]
    files: Sequence[Path]
    expected_md5s: Mapping[Path, frozenset[str]]
    about: Mapping[str, Any]

    @classmethod
    def of(cls, reader: CheckpointReader) -> DerivedReader:
        """The same, for `dataclasses.replace`."""
        return cls(**{one.name: getattr(reader, one.name) for one in fields(cls)})


@dataclass(frozen=True, slots=True)
class MemoryReader:
    """A CheckpointReader over full tensors in memory: random weights, tests."""

    args: ModelArgs
    dtype: torch.dtype
    tensors: Mapping[str, TensorSource]
    quantized: Mapping[str, QuantizedSource] = field(default_factory=dict)
    files: Sequence[Path] = ()
    expected_md5s: Mapping[Path, frozenset[str]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=lambda: {"source": "memory"})

    @classmethod
    def of(cls, args: ModelArgs, tensors: Mapping[str, Tensor]) -> MemoryReader:
        """A reader of a state dict whose tensors all have the same dtype."""
        sources = {name: MemoryTensor(tensor) for name, tensor in tensors.items()}
        return cls(args, next(iter(sources.values())).dtype, sources)
