"""From a plain model to one rank of N, in two steps.

`parallelize` declares the plan with DTensor placements, on the meta device: the form that checkpoints are loaded
into. `localize` turns that form into plain local tensors with explicit reductions: the form that computes. Both forms
are the same `Transformer`, and a test holds them to the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llama_tp.config import ModelArgs
from llama_tp.model.norm import HeadNorm, Norm
from llama_tp.model.transformer import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from llama_tp.model.weights import DENSE, WeightFormat
from llama_tp.parallel.comm import Comm
from llama_tp.parallel.local_modules import (
    FusedAttention,
    FusedFeedForward,
    RowLinear,
    VocabEmbedding,
    VocabLinear,
)
from llama_tp.parallel.sharding import COLUMN, LLAMA_TP_PLAN, ROW, VOCAB_IN, VOCAB_OUT, check_tp_size, local_kv_heads


class ReplicatedHeads(ParallelStyle):
    """Column-parallel over fewer heads than ranks: each kv head lives on `replicas` neighbouring ranks."""

    def __init__(self, num_kv_heads: int, mesh: DeviceMesh) -> None:
        super().__init__()
        shape = (num_kv_heads, mesh.size() // num_kv_heads)
        self.mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("kv_head", "replica"))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard(_name: str, linear: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(linear.named_parameters(recurse=False)):
                shards = distribute_tensor(parameter, mesh, [Shard(0), Replicate()])
                linear.register_parameter(name, nn.Parameter(shards, requires_grad=False))

        def to_mesh(_module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Replicate(), Replicate()], run_check=False)

        def to_local(_module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        # distribute_module's annotation has its hooks return None; their results are what counts.
        return distribute_module(module, self.mesh, shard, cast(Any, to_mesh), cast(Any, to_local))


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Make every weight that the plan names a DTensor over a one-dimensional mesh. ValueError for an illegal size.

    The vocabulary is split as torch.chunk splits: the last ranks may hold fewer rows.
    """
    args = model.args
    check_tp_size(args, mesh.size())
    styles = {pattern: _STYLES[sharding]() for pattern, sharding in LLAMA_TP_PLAN.items()}
    if mesh.size() > args.n_kv_heads:
        heads = ReplicatedHeads(args.n_kv_heads, mesh)
        styles |= {pattern: heads for pattern in styles if pattern.endswith((".wk", ".wv"))}
    parallelize_module(model, mesh, styles)
    model.tie_embeddings()
    return model


_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    COLUMN: ColwiseParallel,
    ROW: RowwiseParallel,
    VOCAB_IN: lambda: RowwiseParallel(input_layouts=Replicate()),
    VOCAB_OUT: lambda: ColwiseParallel(output_layouts=Replicate()),
}


@torch.no_grad()
def localize(model: Transformer, comm: Comm, weight_format: WeightFormat = DENSE) -> Transformer:
    """Replace, in place, every sharded module by one on plain local tensors. The logits then reach the leader only.

    wq|wk|wv and w1|w3 are fused along their local output dim; `weight_format` makes the linear layers. The originals
    are freed layer by layer.
    """
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.attention, block.feed_forward
        assert isinstance(attention, Attention)
        assert isinstance(feed_forward, FeedForward)
        block.attention = _fused_attention(attention, model.args, comm, weight_format)
        block.feed_forward = FusedFeedForward(
            w13=weight_format.linear([_take_shard(w) for w in (feed_forward.w1, feed_forward.w3)]),
            w2=_row_linear(feed_forward.w2, comm, weight_format),
        )
        block.attention_norm = _norm(block.attention_norm)  # type: ignore[assignment]
        block.ffn_norm = _norm(block.ffn_norm)  # type: ignore[assignment]
    model.norm = _norm(model.norm)  # type: ignore[assignment]
    vocab_size = model.args.vocab_size
    rows = -(-vocab_size // comm.size)
    embedding = _padded(_local(model.tok_embeddings.weight), rows)
    if model.args.tied_embeddings:
        output = {"weight": embedding}
    else:
        output = {name: _padded(part, rows) for name, part in _take_shard(model.output).items()}
    model.tok_embeddings = VocabEmbedding(embedding, comm)  # type: ignore[assignment]
    model.output = VocabLinear(weight_format.linear([output]), comm, vocab_size)  # type: ignore[assignment]
    return model


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, RMSNorm)
    return Norm(_local(norm.weight), norm.eps)


def _fused_attention(attention: Attention, args: ModelArgs, comm: Comm, weight_format: WeightFormat) -> FusedAttention:
    wqkv = weight_format.linear([_take_shard(w) for w in (attention.wq, attention.wk, attention.wv)])
    num_kv_heads = local_kv_heads(args, comm.size)
    num_heads = wqkv.out_features // args.head_dim - 2 * num_kv_heads
    return FusedAttention(
        wqkv=wqkv,
        wo=_row_linear(attention.wo, comm, weight_format),
        num_kv_heads=num_kv_heads,
        head_dim=args.head_dim,
        qk_norm=_qk_norm(attention, num_heads, num_kv_heads, args.norm_eps) if args.qk_norm else None,
    )


def _qk_norm(attention: Attention, num_heads: int, num_kv_heads: int, eps: float) -> HeadNorm:
    """One norm for all local query and key heads side by side."""
    norms = (attention.q_norm, num_heads), (attention.k_norm, num_kv_heads)
    return HeadNorm(torch.cat([_local(cast(Tensor, norm.weight)).expand(heads, -1) for norm, heads in norms]), eps)


def _row_linear(linear: nn.Module, comm: Comm, weight_format: WeightFormat) -> RowLinear:
    """Its bias, which every rank has in full, belongs to the sum over the ranks."""
    shard = _take_shard(linear)
    bias = shard.pop("bias", None)
    return RowLinear(weight_format.linear([shard]), comm, bias)


def _take_shard(linear: nn.Module) -> dict[str, Tensor]:
    """A layer's local parameters; the layer lets go of them."""
    shard = {name: _local(parameter) for name, parameter in linear.named_parameters(recurse=False)}
    for name in shard:
        delattr(linear, name)
    return shard


def _padded(weight: Tensor, rows: int) -> Tensor:
    """The same rows, then zeros, so that every rank's share of the vocabulary has the same size."""
    if weight.size(0) == rows:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - weight.size(0), weight.size(1))])
