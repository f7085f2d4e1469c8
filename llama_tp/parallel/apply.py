"""From a plain model to one rank of N, in two steps.

`parallelize` declares the sharding plan with DTensor placements, on the meta device: the form that checkpoints are
loaded into. `localize` turns it into plain local tensors with explicit reductions: the form that computes. Both are the
same `Transformer`, and a test compares their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llama_tp.model.norm import HeadNorm, Norm
from llama_tp.model.transformer import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from llama_tp.model.weights import (
    DENSE,
    DENSE_FORMATS,
    PACKED,
    Layout,
    WeightFormat,
    WeightFormats,
    weight_shapes,
)
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import Comm
from llama_tp.parallel.local_modules import (
    FusedAttention,
    FusedFeedForward,
    RowLinear,
    VocabEmbedding,
    VocabLinear,
)
from llama_tp.parallel.sharding import (
    COLUMN,
    LLAMA_TP_PLAN,
    ROW,
    VOCAB_IN,
    VOCAB_OUT,
    Ranks,
    check_tp_size,
    local_kv_heads,
    num_ranks,
    padded_length,
    shard,
    tp_dim,
    vocab_shard,
)


def parallelize(model: Transformer, mesh: DeviceMesh, ranks: Ranks | None = None) -> Transformer:
    """Make every weight that the plan names a DTensor over a one-dimensional mesh. ValueError for illegal ranks.

    `ranks`: the shares; None: equal ones.

    DTensor splits evenly, so shares of different sizes are padded with zeros to the largest, which changes no result:
    zero heads and zero hidden columns add nothing to the output. The vocabulary is split like torch.chunk: the last
    ranks may have fewer rows.
    """
    args = model.args
    ranks = mesh.size() if ranks is None else ranks
    check_tp_size(args, ranks)
    for name, parameter in list(model.named_parameters()):
        if tp_dim(name) is not None and name.startswith("layers."):
            module, _, attribute = name.rpartition(".")
            padded = nn.Parameter(_evenly_split(parameter, args, name, ranks), requires_grad=False)
            model.get_submodule(module).register_parameter(attribute, padded)
    parallelize_module(model, mesh, {pattern: _STYLES[sharding]() for pattern, sharding in LLAMA_TP_PLAN.items()})
    model.tie_embeddings()
    return model


def _evenly_split(weight: Tensor, args: ModelArgs, name: str, ranks: Ranks) -> Tensor:
    """The padded shards of all ranks, concatenated."""
    dim = cast(int, tp_dim(name))
    length, size = padded_length(args, name, ranks), num_ranks(ranks)
    padded = weight.new_zeros([length * size if axis == dim else full for axis, full in enumerate(weight.shape)])
    for rank in range(size):
        for position, entries in shard(args, name, ranks, rank).parts:
            held = weight.narrow(dim, entries.start, len(entries))
            padded.narrow(dim, rank * length + position, len(entries)).copy_(held)
    return padded


def hold_shards(model: Transformer, ranks: Ranks, rank: int, formats: WeightFormats) -> None:
    """On the meta device: replace the sharded parameters of a parallelized model by plain tensors of the rank's own
    sizes, and the weights of layers in other `formats` by their parameters.

    So a rank with a small share does not allocate as much as one with the largest.
    """
    shapes = weight_shapes(model.args)
    for name, parameter in list(model.named_parameters()):
        module, _, kind = name.rpartition(".")
        dtype = parameter.dtype
        if kind == "weight" and module in formats:
            del model.get_submodule(module).weight
            for own, (shape, own_dtype) in formats[module].parameters(*shapes[name]).items():
                own_type = dtype if own_dtype is None else getattr(torch, own_dtype)
                _hold_shard(model, f"{module}.{own}", shape, own_type, ranks, rank)
        elif (dim := tp_dim(name)) is not None:
            if isinstance(parameter, DTensor) and name.startswith("layers."):
                assert parameter.to_local().size(dim) == padded_length(model.args, name, ranks)
            _hold_shard(model, name, shapes[name], dtype, ranks, rank)


def _hold_shard(
    model: Transformer, name: str, shape: tuple[int, ...], dtype: torch.dtype, ranks: Ranks, rank: int
) -> None:
    """`shape`: of the whole parameter."""
    if (dim := tp_dim(name)) is not None:
        length = shard(model.args, name, ranks, rank, shape[dim]).length
        shape = tuple(length if axis == dim else size for axis, size in enumerate(shape))
    module, _, kind = name.rpartition(".")
    local = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    model.get_submodule(module).register_parameter(kind, local)


_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    COLUMN: ColwiseParallel,
    ROW: RowwiseParallel,
    VOCAB_IN: lambda: RowwiseParallel(input_layouts=Replicate()),
    VOCAB_OUT: lambda: ColwiseParallel(output_layouts=Replicate()),
}


@torch.no_grad()
def localize(
    model: Transformer,
    comm: Comm,
    formats: WeightFormats = DENSE_FORMATS,
    ranks: Ranks | None = None,
    prepare: Callable[[nn.Module], object] = lambda part: None,
    layout: Layout = PACKED,
) -> Transformer:
    """Replace, in place, every sharded module with one on plain local tensors. The logits then reach the leader only.

    wq|wk|wv and w1|w3 are fused along their local output dim; `formats` make the linear layers. `ranks`: the shares;
    None: equal ones. The originals are freed layer by layer. `prepare` is called with each part of the model
    (embedding, layers, norm, output) before its weights are used, in this order, so that a load need not hold more than
    one part twice. `layout`: of the linear layers on CPUs.
    """
    ranks = comm.size if ranks is None else ranks
    local = _Localizer(model.args, comm, formats, ranks, model.norm.weight.dtype, layout)
    rows = vocab_shard(model.args, comm.size)
    prepare(model.tok_embeddings)
    embedding = _padded(_local(model.tok_embeddings.weight), rows)
    model.tok_embeddings = VocabEmbedding(embedding, comm)  # type: ignore[assignment]
    for index, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        prepare(block)
        block.attention = local.attention(block.attention, f"layers.{index}.attention")
        block.feed_forward = local.feed_forward(block.feed_forward, f"layers.{index}.feed_forward")
        block.attention_norm = _norm(block.attention_norm)  # type: ignore[assignment]
        block.ffn_norm = _norm(block.ffn_norm)  # type: ignore[assignment]
    prepare(model.norm)
    model.norm = _norm(model.norm)  # type: ignore[assignment]
    if model.args.tied_embeddings:
        output = {"weight": embedding}
    else:
        prepare(model.output)
        output = {name: _padded(_local(one), rows) for name, one in model.output.named_parameters()}
    linear = formats.get("output", DENSE).linear([output], local.dtype, layout)
    model.output = VocabLinear(linear, comm, model.args.vocab_size)  # type: ignore[assignment]
    return model


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, RMSNorm)
    return Norm(_local(norm.weight), norm.eps)


@dataclass(frozen=True, slots=True)
class _Localizer:
    """Makes one rank's local modules from those that hold its shards, which are removed from them."""

    args: ModelArgs
    comm: Comm
    formats: WeightFormats
    ranks: Ranks
    dtype: torch.dtype
    """To compute in."""
    layout: Layout

    def attention(self, attention: Attention, name: str) -> FusedAttention:
        wqkv = self._format(f"{name}.wq").linear(
            [self._pop_parameters(attention, name, layer) for layer in ("wq", "wk", "wv")],
            self.dtype,
            self.layout,
        )
        num_kv_heads = local_kv_heads(self.args, self.ranks, self.comm.rank)
        num_heads = wqkv.out_features // self.args.head_dim - 2 * num_kv_heads
        return FusedAttention(
            wqkv=wqkv,
            wo=self._row_linear(attention, name, "wo"),
            num_kv_heads=num_kv_heads,
            head_dim=self.args.head_dim,
            qk_norm=_qk_norm(attention, num_heads, num_kv_heads, self.args.norm_eps) if self.args.qk_norm else None,
        )

    def feed_forward(self, feed_forward: FeedForward, name: str) -> FusedFeedForward:
        return FusedFeedForward(
            w13=self._format(f"{name}.w1").linear(
                [self._pop_parameters(feed_forward, name, layer) for layer in ("w1", "w3")],
                self.dtype,
                self.layout,
            ),
            w2=self._row_linear(feed_forward, name, "w2"),
        )

    def _row_linear(self, owner: nn.Module, name: str, layer: str) -> RowLinear:
        """Its bias, which every rank has in full, is added after the sum over the ranks."""
        local = self._pop_parameters(owner, name, layer)
        bias = local.pop("bias", None)
        linear = self._format(f"{name}.{layer}").linear([local], self.dtype, self.layout)
        return RowLinear(linear, self.comm, bias)

    def _format(self, module: str) -> WeightFormat:
        return self.formats.get(module, DENSE)

    def _pop_parameters(self, owner: nn.Module, name: str, layer: str) -> dict[str, Tensor]:
        """A layer's local parameters, without padding; they are removed from the layer."""
        linear = owner.get_submodule(layer)
        local = {}
        for kind, parameter in list(linear.named_parameters(recurse=False)):
            local[kind] = self._unpadded(_local(parameter), f"{name}.{layer}.{kind}")
            delattr(linear, kind)
        return local

    def _unpadded(self, local: Tensor, name: str) -> Tensor:
        """The rank's part of a parameter, without padding; `local` may have none, and of a quantized layer has none."""
        dim = tp_dim(name)
        if dim is None or name.rpartition(".")[0] in self.formats:
            return local
        own = shard(self.args, name, self.ranks, self.comm.rank)
        if local.size(dim) == own.length:
            return local
        parts = [local.narrow(dim, one.start, len(one)) for one in own.kept]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _qk_norm(attention: Attention, num_heads: int, num_kv_heads: int, eps: float) -> HeadNorm:
    """One norm for all local query and key heads."""
    norms = (attention.q_norm, num_heads), (attention.k_norm, num_kv_heads)
    return HeadNorm(torch.cat([_local(cast(Tensor, norm.weight)).expand(heads, -1) for norm, heads in norms]), eps)


def _padded(weight: Tensor, rows: int) -> Tensor:
    """Pad with zero rows, so that every rank's share of the vocabulary has the same size."""
    if weight.size(0) == rows:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - weight.size(0), weight.size(1))])
