"""Quantize a dense checkpoint while it is read, or make a quantized one dense."""

from __future__ import annotations

from dataclasses import replace

import torch

from llama_tp.checkpoint.formats.quantized import QuantizedOnReading, dense_tensors
from llama_tp.checkpoint.formats.reader import CheckpointReader, DerivedReader
from llama_tp.model.weights import Quantized, quantized_args, quantized_formats


def quantizing(reader: CheckpointReader, quantize: str) -> CheckpointReader:
    """The model with its linear layers in int8 or int4. ValueError if it is quantized already, or cannot be."""
    if reader.quantized:
        raise ValueError(
            f"quantize={quantize!r}, but {len(reader.quantized)} layers of the source are quantized: leave it out to "
            "keep them as they are, or convert the original weights"
        )
    formats = quantized_formats(reader.args, quantize)
    tensors = dict(reader.tensors)
    quantized = {}
    for module, one in formats.items():
        assert isinstance(one, Quantized)
        name = f"{module}.weight"
        if name in tensors:
            source = tensors.pop(name)
        else:  # a tied output
            name = "tok_embeddings.weight"
            source = tensors[name]
        quantized[module] = QuantizedOnReading(source, one.name, name)
    about = {**reader.about, "quantized": quantize}
    return replace(
        DerivedReader.of(reader), args=quantized_args(reader.args), tensors=tensors, quantized=quantized, about=about
    )


def dense(reader: CheckpointReader, dtype: torch.dtype | None = None) -> CheckpointReader:
    """The model without quantized layers. dtype: of those that were; None: that of the others."""
    if not reader.quantized:
        return reader
    tensors = dense_tensors(reader, reader.dtype if dtype is None else dtype)
    args = replace(reader.args, quantization_group=1)
    return replace(DerivedReader.of(reader), args=args, tensors=tensors, quantized={})
