"""What ranks of every size hold after they were really parallelized and localized is what the sharding table says."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_tp.config import EngineConfig
from llama_tp.engine.memory import MemoryModel
from llama_tp.model.linear import Linear
from llama_tp.model.transformer import Transformer
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.apply import hold_shards, localize, parallelize
from llama_tp.parallel.sharding import heads, local_shapes, num_parameters_of_rank, num_ranks, tp_dim

SHAPES = {
    "7B": ModelArgs(dim=128, n_layers=1, n_heads=32, n_kv_heads=32, vocab_size=320, ffn_hidden_dim=344),
    "70B": ModelArgs(dim=128, n_layers=1, n_heads=64, n_kv_heads=8, vocab_size=320, ffn_hidden_dim=896),
    "405B": ModelArgs(dim=256, n_layers=1, n_heads=128, n_kv_heads=8, vocab_size=501, ffn_hidden_dim=1664),
    "Qwen2.5 7B": ModelArgs(
        dim=112, n_layers=1, n_heads=28, n_kv_heads=4, vocab_size=297, ffn_hidden_dim=592, qkv_bias=True
    ),
    "Qwen3 32B": ModelArgs(
        dim=80,
        n_layers=1,
        n_heads=64,
        n_kv_heads=8,
        vocab_size=301,
        ffn_hidden_dim=400,
        attention_head_dim=2,
        qk_norm=True,
    ),
}
"""Heads, kv heads and features of the published models, with narrow heads."""


@contextmanager
def parallelized(args, ranks, rank):
    """This process as one rank of a group whose collectives do nothing: its parallelized model on the meta device."""
    size = num_ranks(ranks)
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        with torch.device("meta"):
            model = Transformer(args).requires_grad_(False).eval()
        yield parallelize(model, mesh, ranks)
    finally:
        dist.destroy_process_group()


def localized(args, ranks, rank):
    """The rank's local model."""
    with parallelized(args, ranks, rank) as model:
        return localized_from(model, ranks, rank)


def distinct(args, ranks):
    """The first rank of each kind, and the last, which has fewer tokens of the vocabulary."""
    kinds = {}
    for rank in range(num_ranks(ranks)):
        shapes = tuple(local_shapes(args, ranks, rank).values())
        kinds.setdefault(shapes, rank)
    return sorted({*kinds.values(), num_ranks(ranks) - 1})


UNEQUAL = [
    ("70B", (24, 24, 16)),
    ("70B", (1, 40, 23)),
    ("7B", (17, 15)),
    ("405B", (64, 32, 16, 16)),
    ("Qwen2.5 7B", (14, 7, 7)),
    ("Qwen3 32B", (5, 5, 54)),
]


@pytest.mark.parametrize(("name", "ranks"), [*((name, size) for name in SHAPES for size in range(1, 17)), *UNEQUAL])
def test_a_rank_holds_what_the_table_says(name, ranks):
    args = SHAPES[name]
    config = EngineConfig(max_seq_len=64)
    for rank in distinct(args, ranks):
        model = localized(args, ranks, rank)
        shapes, (block,) = local_shapes(args, ranks, rank), model.layers
        attention, feed_forward = block.attention, block.feed_forward
        rows = {kind: shapes[f"layers.0.attention.{kind}.weight"][0] for kind in ("wq", "wk", "wv")}
        assert attention.split == (
            sum(rows[kind] for kind in ("wq", "wk")) // args.head_dim,
            rows["wv"] // args.head_dim,
        )
        assert (attention.wqkv.out_features, attention.wqkv.in_features) == (sum(rows.values()), args.dim)
        assert attention.wo.linear.in_features == shapes["layers.0.attention.wo.weight"][1] == rows["wq"]
        hidden = shapes["layers.0.feed_forward.w1.weight"][0]
        assert (feed_forward.w13.out_features, feed_forward.w2.linear.in_features) == (2 * hidden, hidden)
        assert tuple(model.tok_embeddings.weight.shape) == shapes["tok_embeddings.weight"]
        assert model.output.linear.out_features == shapes["output.weight"][0]
        memory = MemoryModel.of(args, config, ranks, rank, "float32", "cpu")
        linears = sum(module.num_bytes for module in model.modules() if isinstance(module, Linear))
        norms = (2 * args.n_layers + 1) * args.dim + 2 * args.head_dim * args.qk_norm
        assert memory.weights - 4 * norms == linears + model.tok_embeddings.weight.nbytes
        assert memory.weights == 4 * num_parameters_of_rank(args, ranks, rank)
        assert memory.token == 2 * 4 * args.n_layers * len(heads(args, ranks, rank)) * args.head_dim


@pytest.mark.parametrize(("name", "ranks"), [("70B", 7), ("405B", 12), *UNEQUAL])
def test_a_rank_allocates_no_more_than_it_holds_before_it_loads(name, ranks):
    """A rank with a small share held as much as the one with the largest, while it loaded."""
    args, has_shrunk = SHAPES[name], False
    for rank in distinct(args, ranks):
        shapes = local_shapes(args, ranks, rank)
        with parallelized(args, ranks, rank) as model:
            padded = {key: weight.to_local().shape for key, weight in split_layers(model)}
            hold_shards(model, ranks, rank, {})
            own = {key: local_of(weight).shape for key, weight in split_layers(model)}
            assert own == {key: shapes[key] for key in own}
            has_shrunk |= own != padded
            assert (
                localized_from(model, ranks, rank).layers[0].attention.wo.linear.in_features
                == (shapes["layers.0.attention.wo.weight"][1])
            )
    assert has_shrunk


def split_layers(model):
    """(name, weight) of what the plan splits in the layers."""
    return [
        (name, weight)
        for name, weight in model.named_parameters()
        if name.startswith("layers.") and tp_dim(name) is not None
    ]


def local_of(weight):
    return weight.to_local() if isinstance(weight, DTensor) else weight


def localized_from(model, ranks, rank):
    comm = SimpleNamespace(size=num_ranks(ranks), rank=rank, is_leader=rank == 0)
    return localize(model.to_empty(device="cpu"), comm, ranks=ranks)
