"""The weights of a model: their names and shapes, and how linear layers hold them.

A weight format is the extension point for quantization: it gives a layer's size in memory, and makes the layer from one
rank's tensors. Torch is imported only for the latter, so that memory can be planned without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from llama_tp.config import ModelArgs

if TYPE_CHECKING:
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


class WeightFormat(Protocol):
    """How linear layers hold their weights."""

    def num_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """A layer's size in memory. `itemsize`: bytes per element of its compute dtype."""
        ...

    def linear(self, shards: Sequence[Mapping[str, Tensor]]) -> Linear:
        """The layer whose output is the concatenation of the shards' outputs. Each shard maps the names of a layer's
        parameters to this rank's part of them."""
        ...


class Dense:
    """Plain matrices: `weight`, and `bias` where a layer has one."""

    def num_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        return out_features * in_features * itemsize

    def linear(self, shards: Sequence[Mapping[str, Tensor]]) -> Linear:
        from llama_tp.model.linear import DenseLinear

        return DenseLinear(**{name: _join([shard[name] for shard in shards]) for name in shards[0]})


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


DENSE = Dense()
