"""The sharding plan names what is there, and its arithmetic is that of the shards themselves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from llama_tp.config import ModelArgs
from llama_tp.model.transformer import Transformer
from llama_tp.parallel.sharding import (
    COLUMN,
    LLAMA_TP_PLAN,
    ROW,
    VOCAB_IN,
    VOCAB_OUT,
    check_tp_size,
    legal_tp_sizes,
    num_parameters_of_rank,
    why_illegal,
)
from tests.published_params import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_1_8B, LLAMA_3_2_1B

MODELS = {
    "7B": (LLAMA_2_7B, [1, 2, 4, 8, 16, 32]),
    "13B": (LLAMA_2_13B, [1, 2, 4, 8]),  # 5, 10, 20 and 40 divide the heads but not 13824
    "70B": (LLAMA_2_70B, [1, 2, 4, 8, 16, 32, 64]),  # from 16 on, with replicated kv heads
    "3.1 8B": (LLAMA_3_1_8B, [1, 2, 4, 8, 16, 32]),
    "3.2 1B": (LLAMA_3_2_1B, [1, 2, 4, 8, 16, 32]),
    "demo": (DEMO, [1, 3]),  # 9 divides the heads but not 1536
}
TINY = ModelArgs(dim=96, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=131, multiple_of=48)


def args_of(name):
    args = ModelArgs.from_params(json.loads(MODELS[name][0]))
    return args.with_vocab_size(32000) if args.vocab_size == -1 else args


def meta_model(args):
    with torch.device("meta"):
        return Transformer(args)


def kind_of(name):
    """The plan's entry for a weight; None: replicated."""
    pattern = ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))
    return LLAMA_TP_PLAN.get(pattern)


@pytest.mark.parametrize("name", MODELS)
def test_the_legal_sizes_of_known_models(name):
    assert legal_tp_sizes(args_of(name)) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_a_legal_size_splits_every_dim_evenly_and_an_illegal_one_does_not(name):
    """By the definition: whole heads, whole kv heads or whole copies of them, whole columns of the feed-forward."""
    args = args_of(name)
    for size in range(1, 2 * args.n_heads):
        whole = [args.n_heads / size, args.hidden_dim / size]
        whole.append(max(args.n_kv_heads, size) / min(args.n_kv_heads, size))
        assert (why_illegal(args, size) is None) == all(number.is_integer() for number in whole), size


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("7B", 3, "does not divide n_heads=32"),
        ("7B", 64, "does not divide n_heads=32"),
        ("13B", 5, "does not divide the feed-forward hidden size 13824"),
        ("demo", 9, "hidden size 1536"),
        ("demo", 0, "at least 1"),
        ("demo", -3, "at least 1"),
    ],
)
def test_an_illegal_size_is_refused_with_the_reason_and_the_legal_ones(name, size, reason):
    legal = ", ".join(map(str, MODELS[name][1]))
    with pytest.raises(ValueError, match=reason) as caught:
        check_tp_size(args_of(name), size)
    assert f"tensor_parallel_size={size} " in str(caught.value)
    assert str(caught.value).endswith(f"legal sizes for this model: {legal}")


def test_kv_heads_that_fit_neither_way_are_refused():
    args = ModelArgs(dim=96, n_layers=1, n_heads=12, n_kv_heads=4, vocab_size=10, multiple_of=48)
    assert "n_kv_heads=4" in str(why_illegal(args, 6))  # 6 divides 12, but 6 and 4 do not go into each other


def test_the_plan_names_only_modules_that_exist():
    patterns = {
        ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name, module in meta_model(TINY).named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    assert set(LLAMA_TP_PLAN) == patterns


def test_the_plan_shards_every_matrix_and_no_vector():
    for name, weight in meta_model(TINY).named_parameters():
        assert (kind_of(name) is not None) == (weight.dim() == 2), name


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_alone_holds_the_parameters_of_the_model(name):
    model = meta_model(args_of(name))
    assert num_parameters_of_rank(args_of(name), 1) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("7B", 6.738), ("13B", 13.016), ("70B", 68.977), ("3.1 8B", 8.030)])
def test_the_parameters_of_known_models(name, billions):
    assert num_parameters_of_rank(args_of(name), 1) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_a_rank_holds_the_sum_of_its_shards(size, tied):
    args = ModelArgs(**{**TINY.to_dict(), "tied_embeddings": tied})
    assert size in legal_tp_sizes(args)
    total = 0
    for name, weight in meta_model(args).named_parameters():  # a tied weight is there once
        rows, columns = weight.shape if weight.dim() == 2 else (1, weight.numel())
        kind = kind_of(name)
        if kind in (VOCAB_IN, VOCAB_OUT):
            rows = math.ceil(rows / size)
        elif kind == COLUMN and name.split(".")[-2] in ("wk", "wv"):
            rows = max(args.head_dim, rows // size)  # never less than a head
        elif kind == COLUMN:
            rows //= size
        elif kind == ROW:
            columns //= size
        total += rows * columns
    assert num_parameters_of_rank(args, size) == total
