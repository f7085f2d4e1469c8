"""Quantized matrices that are read a part at a time: in Meta's order, made from dense ones, or as dense ones."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import CheckpointReader, QuantizedSource, TensorSource
from llama_tp.checkpoint.formats.rotary import stored_rows
from llama_tp.model.quantization import QuantizedWeight, dequantize, quantize
from llama_tp.model.weights import FUSED, GROUP, Form, Quantized, WeightFormats, weight_shapes


def formats_of_reader(reader: CheckpointReader) -> WeightFormats:
    """The formats of its quantized layers."""
    return {module: _format(source) for module, source in reader.quantized.items()}


def parameters_of(reader: CheckpointReader) -> dict[str, TensorSource]:
    """All parameters of the model as they are stored: dense ones, and what stands for quantized weights."""
    recent = _Recent()
    parameters = dict(reader.tensors)
    for module, source in reader.quantized.items():
        for kind, (shape, dtype) in _format(source).parameters(*source.shape).items():
            assert dtype is not None
            parameters[f"{module}.{kind}"] = _Part(module, kind, shape, getattr(torch, dtype), source, recent)
    return parameters


def dense_tensors(reader: CheckpointReader, dtype: torch.dtype) -> dict[str, TensorSource]:
    """All weights and biases as dense tensors, in the model's order. dtype: of those that are quantized."""
    dense = {f"{module}.weight": Dequantized(source, dtype) for module, source in reader.quantized.items()}
    every = {**reader.tensors, **dense}
    return {name: every[name] for name in weight_shapes(reader.args)}


def num_bytes(reader: CheckpointReader) -> int:
    """Of all parameters."""
    return sum(math.prod(source.shape) * source.dtype.itemsize for source in parameters_of(reader).values())


def in_one_format(found: Mapping[str, QuantizedSource]) -> dict[str, QuantizedSource]:
    """Those of the layers that can stay quantized: layers of a fused group only if all of them have the same form."""
    kept = dict(found)
    layers = {module.rpartition(".")[0].rpartition(".")[0] for module in found if module.startswith("layers.")}
    for layer in layers:
        for group in FUSED:
            modules = [f"{layer}.{name}" for name in group]
            forms = {found[module].form if module in found else None for module in modules}
            if len(forms) > 1:
                for module in modules:
                    kept.pop(module, None)
            elif len({found[module].offsets_dtype for module in modules if module in found}) > 1:
                kept |= {module: _WithFloat32Offsets(found[module]) for module in modules}
    return kept


def _format(source: QuantizedSource) -> Quantized:
    return Quantized(source.form, str(source.offsets_dtype).removeprefix("torch."))


class _Recent:
    """The quantized matrices that were read last, in whole: their parameters are written one after another, by one of
    several threads, and quantizing takes long."""

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._matrices: OrderedDict[str, QuantizedWeight] = OrderedDict()

    def read(self, module: str, source: QuantizedSource) -> QuantizedWeight:
        with self._lock:
            found = self._matrices.get(module)
        if found is None:
            found = source.read(0, 0, source.shape[0])
            with self._lock:
                self._matrices[module] = found
                while len(self._matrices) > self._capacity:
                    self._matrices.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True)
class _Part:
    """A TensorSource: one parameter of a quantized layer."""

    module: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: QuantizedSource = field(repr=False)
    recent: _Recent = field(repr=False)

    def read(self, dim: int, start: int, length: int) -> Tensor:
        matrix = self.recent.read(self.module, self.source)
        part = getattr(matrix, "scales" if self.kind == "row_scales" else self.kind)
        assert (part.shape, part.dtype) == (self.shape, self.dtype)
        return cast(Tensor, part).narrow(dim, start, length)


@dataclass(frozen=True, slots=True)
class _WithFloat32Offsets:
    """A QuantizedSource of int4 whose offsets are widened."""

    source: QuantizedSource
    offsets_dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def form(self) -> Form:
        return self.source.form

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        quantized = self.source.read(dim, start, length)
        assert quantized.offsets is not None
        return replace(quantized, offsets=quantized.offsets.float())


@dataclass(frozen=True, slots=True)
class QuantizedOnReading:
    """A QuantizedSource of a dense matrix."""

    dense: TensorSource
    form: Form
    name: str
    """Of the matrix, for errors."""
    offsets_dtype: torch.dtype = torch.float16

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.dense.shape
        return rows, columns

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        dense = self.dense.read(dim, start, length)
        try:
            return quantize(dense, self.form)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


@dataclass(frozen=True, slots=True)
class Dequantized:
    """A TensorSource of a quantized matrix."""

    quantized: QuantizedSource
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantized.shape

    def read(self, dim: int, start: int, length: int) -> Tensor:
        if dim == 0:
            return dequantize(self.quantized.read(0, start, length), self.dtype)
        first, end = start // GROUP * GROUP, -(-(start + length) // GROUP) * GROUP
        return dequantize(self.quantized.read(1, first, end - first), self.dtype).narrow(1, start - first, length)


@dataclass(frozen=True, slots=True)
class RotaryQuantized:
    """A QuantizedSource that gives the rows of whole heads in Meta's order, as RotaryTensor does.

    Rows can be reordered because groups are within a row. Holds up to two heads more than are read.
    """

    stored: QuantizedSource
    head_dim: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    @property
    def form(self) -> Form:
        return self.stored.form

    @property
    def offsets_dtype(self) -> torch.dtype:
        return self.stored.offsets_dtype

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        if dim != 0:
            return self.stored.read(dim, start, length).select_rows(stored_rows(0, self.shape[0], self.head_dim))
        first = start // self.head_dim * self.head_dim
        end = -(-(start + length) // self.head_dim) * self.head_dim
        return self.stored.read(0, first, end - first).select_rows(stored_rows(start, length, self.head_dim) - first)
