"""The weights of a model: their names and shapes, and how linear layers hold them.

A weight format is the extension point for quantization: it names a layer's parameters, and makes the layer from one
rank's part of them. Torch is imported only for the latter, so that memory can be planned without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from llama_tp.model_args import ModelArgs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama_tp.model.linear import Linear


Shapes = dict[str, tuple[int, ...]]
"""Shapes of unsharded weights, by Meta's names."""


def weight_shapes(args: ModelArgs) -> Shapes:
    """All weights of the model. `output.weight` is absent if embeddings are tied."""
    layer, other = layer_shapes(args)
    shapes = {"tok_embeddings.weight": other.pop("tok_embeddings.weight")}
    for index in range(args.n_layers):
        shapes |= {f"layers.{index}.{name.removeprefix('layers.0.')}": shape for name, shape in layer.items()}
    return shapes | other


def layer_shapes(args: ModelArgs) -> tuple[Shapes, Shapes]:
    """(weights of the first layer, which stands for all layers; weights outside the layers)."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layer: Shapes = {
        "attention.wq.weight": (q_dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, q_dim),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
    }
    layer |= {name: (size,) for name, size in _optional_vectors(args).items()}
    other: Shapes = {"tok_embeddings.weight": (args.vocab_size, args.dim), "norm.weight": (args.dim,)}
    if not args.tied_embeddings:
        other["output.weight"] = (args.vocab_size, args.dim)
    return {f"layers.0.{name}": shape for name, shape in layer.items()}, other


def _optional_vectors(args: ModelArgs) -> dict[str, int]:
    """Weights of a layer that Meta's models lack: biases, and norms of query and key heads."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    sizes: dict[str, int] = {}
    if args.qkv_bias:
        sizes |= {"attention.wq.bias": q_dim, "attention.wk.bias": kv_dim, "attention.wv.bias": kv_dim}
    if args.wo_bias:
        sizes["attention.wo.bias"] = args.dim
    if args.ffn_bias:
        sizes |= {f"feed_forward.{name}.bias": args.hidden_dim for name in ("w1", "w3")}
        sizes["feed_forward.w2.bias"] = args.dim
    if args.qk_norm:
        sizes |= {f"attention.{name}.weight": args.head_dim for name in ("q_norm", "k_norm")}
    return sizes


Parameters = dict[str, tuple[tuple[int, ...], str | None]]
"""Shape and dtype of a layer's parameters. None: the dtype that the layer computes in."""


Form = Literal["int8", "int8_groups", "int4"]
"""How a matrix is quantized."""


Layout = Literal["packed", "stored", "both"]
"""How a layer on a CPU holds its weight: packed for PyTorch's kernels, as stored for compiled kernels, or both until
these are compiled. A dense layer's stored weight serves both."""
PACKED: Layout = "packed"
STORED: Layout = "stored"


class WeightFormat(Protocol):
    """How linear layers hold their weights."""

    @property
    def name(self) -> str: ...

    def parameters(self, out_features: int, in_features: int) -> Parameters:
        """What stands for the weight in a checkpoint."""
        ...

    def held(
        self, out_features: int, in_features: int, dtype: str, device_type: str, layout: Layout = PACKED
    ) -> Parameters:
        """What stands for it in the memory of a device (cpu or cuda) that computes in `dtype`."""
        ...

    def linear(self, shards: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, layout: Layout = PACKED) -> Linear:
        """The layer whose output is the concatenation of the shards' outputs, in `dtype`. Each shard maps the names of
        a layer's parameters, of which `bias` may be missing, to this rank's part of them."""
        ...


WeightFormats = Mapping[str, WeightFormat]
"""The formats of linear layers, by Meta's names of the modules. Those that are missing are dense."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Plain matrices."""

    name: str = "dense"

    def parameters(self, out_features: int, in_features: int) -> Parameters:
        return {"weight": ((out_features, in_features), None)}

    def held(
        self, out_features: int, in_features: int, dtype: str, device_type: str, layout: Layout = PACKED
    ) -> Parameters:
        return self.parameters(out_features, in_features)

    def linear(self, shards: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, layout: Layout = PACKED) -> Linear:
        from llama_tp.model.linear import DenseLinear

        return DenseLinear(**{name: _join([shard[name] for shard in shards]) for name in shards[0]}, layout=layout)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Integers, and scales that turn them back into weights: see `llama_tp.model.quantization`."""

    name: Form
    offsets: str = "float16"
    """The dtype of the offsets of int4."""

    def parameters(self, out_features: int, in_features: int) -> Parameters:
        groups = (out_features, in_features // GROUP)
        if self.name == "int8":
            return {"weight": ((out_features, in_features), "int8"), "row_scales": ((out_features, 1), "float32")}
        if self.name == "int8_groups":
            return {"weight": ((out_features, in_features), "int8"), "scales": (groups, "float16")}
        packed = (out_features, in_features // 2)
        return {"weight": (packed, "uint8"), "scales": (groups, "float16"), "offsets": (groups, self.offsets)}

    def held(
        self, out_features: int, in_features: int, dtype: str, device_type: str, layout: Layout = PACKED
    ) -> Parameters:
        stored = self.parameters(out_features, in_features)
        if device_type != "cpu" or (dtype == "bfloat16" and layout == STORED):
            return stored
        packed = self._packed(out_features, in_features, dtype)
        if dtype != "bfloat16" or layout == PACKED:
            return packed
        return packed | {f"stored {name}": one for name, one in stored.items()}

    def _packed(self, out_features: int, in_features: int, dtype: str) -> Parameters:
        """For PyTorch's kernels on CPUs."""
        if dtype == "bfloat16" and self.name == "int8":
            return {"weight": ((out_features, in_features), "int8"), "scales": ((out_features,), None)}
        if dtype == "bfloat16" and self.name == "int4":
            rows = -(-out_features // ROW_BLOCK) * ROW_BLOCK
            scales = (in_features // GROUP, rows, 2)
            return {"weight": ((rows, in_features // 2), "uint8"), "scales_and_zeros": (scales, None)}
        return DENSE.parameters(out_features, in_features)  # no kernel: widened once

    def linear(self, shards: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, layout: Layout = PACKED) -> Linear:
        from llama_tp.model.quantization import QuantizedWeight
        from llama_tp.model.quantized_linear import quantized_linear

        joined = {name: _join([shard[name] for shard in shards]) for name in shards[0]}
        scales = joined["row_scales" if self.name == "int8" else "scales"]
        quantized = QuantizedWeight(joined["weight"], scales, joined.get("offsets"))
        return quantized_linear(quantized, joined.get("bias"), dtype, layout)


DENSE = Dense()
DENSE_FORMATS: WeightFormats = MappingProxyType({})
"""Of a model without quantized layers."""
GROUP = 32
"""Columns of a quantized matrix that share a scale: ranks do not divide them."""
ROW_BLOCK = 16
"""The rows of an int4 matrix on a CPU are padded to a multiple of this."""
FUSED = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("feed_forward.w1", "feed_forward.w3"),
)
"""Layers that are computed as one, and so have the same format."""


def num_bytes(parameters: Parameters, itemsize: int) -> int:
    """Size of a layer in memory. `itemsize`: bytes per element of its compute dtype."""
    sizes = {"int8": 1, "uint8": 1, "float16": 2, "float32": 4, None: itemsize}
    return sum(math.prod(shape) * sizes[dtype] for shape, dtype in parameters.values())


def parameter_shapes(args: ModelArgs, formats: WeightFormats) -> Shapes:
    """Shapes of all parameters of the model, unsharded, with linear layers in `formats`."""
    shapes: Shapes = {}
    for name, shape in weight_shapes(args).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in formats:
            parameters = formats[module].parameters(*shape)
            shapes |= {f"{module}.{parameter}": one for parameter, (one, _) in parameters.items()}
        else:
            shapes[name] = shape
    return shapes


def formats_of(dtypes: Mapping[str, str]) -> WeightFormats:
    """The formats of the quantized layers among parameters whose dtypes these are."""
    formats: dict[str, WeightFormat] = {}
    for name in dtypes:
        module, _, kind = name.rpartition(".")
        if kind == "row_scales":
            formats[module] = Quantized("int8")
        elif kind == "scales":
            offsets = dtypes.get(f"{module}.offsets")
            formats[module] = Quantized("int8_groups") if offsets is None else Quantized("int4", offsets)
    return formats


def quantized_args(args: ModelArgs) -> ModelArgs:
    """The architecture of the quantized model: the output is quantized, and thus not the embedding any more."""
    return replace(args, tied_embeddings=False, quantization_group=GROUP)


def quantized_formats(args: ModelArgs, quantize: str) -> dict[str, Quantized]:
    """The formats of a model quantized to int8 or int4: of all linear layers, but the output is never in 4 bits.

    ValueError if the model's sizes do not allow it.
    """
    form = QUANTIZATIONS.get(quantize)
    if form is None:
        raise ValueError(f"quantize={quantize!r} must be one of {', '.join(QUANTIZATIONS)}")
    if reason := why_not_quantized(args):
        raise ValueError(f"this model cannot be quantized: {reason}")
    layers = {
        name.removesuffix(".weight"): Quantized(form)
        for name, shape in weight_shapes(args).items()
        if name.startswith("layers.") and name.endswith(".weight") and len(shape) == 2
    }
    return layers | {"output": Quantized("int8" if form == "int8" else "int8_groups")}


QUANTIZATIONS: dict[str, Form] = {"int8": "int8", "int4": "int4"}
"""What dense weights can be converted to."""


def why_not_quantized(args: ModelArgs) -> str | None:
    """Why ranks could not divide a model's quantized weights between groups; None if they can."""
    for name, size in (("dim", args.dim), ("head_dim", args.head_dim), ("the feed-forward's size", args.hidden_dim)):
        if size % GROUP:
            return f"{name}={size} is not a multiple of {GROUP}, the columns that share a scale"
    if args.hidden_dim < GROUP * args.n_heads:
        groups = args.hidden_dim // GROUP
        return f"the feed-forward has {groups} groups of {GROUP} columns, fewer than n_heads={args.n_heads} ranks need"
    return None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dim; without a copy if the parts lie next to each other in memory."""
    import torch

    first, size = parts[0], 0
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != first.data_ptr() + size:
            return torch.cat(list(parts))
        size += part.nbytes
    if first.untyped_storage().nbytes() < first.storage_offset() * first.itemsize + size:
        return torch.cat(list(parts))  # neighbours by chance
    return first.as_strided((sum(part.size(0) for part in parts), *first.shape[1:]), first.stride())
