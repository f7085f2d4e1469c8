"""The sharding plan names what is there, and its arithmetic is that of the shards themselves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import (
    COLUMN,
    LLAMA_TP_PLAN,
    ROW,
    VOCAB_IN,
    VOCAB_OUT,
    check_tp_size,
    feed_forward_step,
    heads,
    local_kv_heads,
    num_parameters_of_rank,
    padded_length,
    shard,
    tp_dim,
    why_illegal,
)
from tests.published_params import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_1_8B, LLAMA_3_2_1B

MODELS = {
    "7B": LLAMA_2_7B,
    "13B": LLAMA_2_13B,
    "70B": LLAMA_2_70B,
    "3.1 8B": LLAMA_3_1_8B,
    "3.2 1B": LLAMA_3_2_1B,
    "demo": DEMO,
}
TINY = ModelArgs(dim=96, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=131, multiple_of=48)
ATTENTION, FFN = "layers.0.attention", "layers.0.feed_forward"


def args_of(name):
    args = ModelArgs.from_params(json.loads(MODELS[name]))
    return args.with_vocab_size(32000) if args.vocab_size == -1 else args


def meta_model(args):
    with torch.device("meta"):
        return Transformer(args)


def kind_of(name):
    """The plan's entry for a weight; None: replicated."""
    pattern = ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))
    return LLAMA_TP_PLAN.get(pattern)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("7B", 33, "exceeds n_heads=32"),
        ("demo", 10, "exceeds n_heads=9"),
        ("demo", 0, "at least 1"),
        ("7B", -3, "at least"),
    ],
)
def test_a_size_that_leaves_a_rank_without_a_head_is_refused(name, size, reason):
    args = args_of(name)
    with pytest.raises(ValueError, match=reason) as caught:
        check_tp_size(args, size)
    assert f"tensor_parallel_size={size} " in str(caught.value)
    assert str(caught.value).endswith(f"this model runs at any size from 1 to {args.n_heads}")


@pytest.mark.parametrize("name", MODELS)
def test_every_other_size_is_legal(name):
    args = args_of(name)
    assert all(why_illegal(args, size) is None for size in range(1, args.n_heads + 1))


def held(args, name, size):
    """The entries of a weight's tp_dim that each rank holds."""
    every = [shard(args, name, size, rank) for rank in range(size)]
    return [[entry for _, entries in one.parts for entry in entries] for one in every]


@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_shares_of_what_is_not_copied_are_a_partition_in_order(name):
    args = args_of(name)
    for size in range(1, args.n_heads + 1):
        for weight in ("tok_embeddings.weight", f"{ATTENTION}.wq.weight", f"{ATTENTION}.wo.weight", f"{FFN}.w2.weight"):
            length = weight_shapes(args).get(weight)[tp_dim(weight)]
            assert [one for rank in held(args, weight, size) for one in rank] == list(range(length)), (weight, size)


@pytest.mark.parametrize("name", MODELS)
def test_every_query_head_is_with_its_kv_head(name):
    """By the definition of grouped-query attention: query head h attends to kv head h // (n_heads / n_kv_heads)."""
    args = args_of(name)
    width = args.head_dim
    for size in range(1, args.n_heads + 1):
        keys = held(args, f"{ATTENTION}.wk.weight", size)
        for rank in range(size):
            queries = shard(args, f"{ATTENTION}.wq.weight", size, rank)
            kv_heads = [entry // width for entry in keys[rank][::width]]
            assert len(kv_heads) == local_kv_heads(args, size, rank)
            # Attention divides the query heads it is given equally among the kv heads.
            group, rest = divmod(queries.length // width, len(kv_heads))
            assert rest == 0
            entry_at = {position + index: entry for position, one in queries.parts for index, entry in enumerate(one)}
            heads = [position for one in queries.kept for position in one][::width]
            for index, kv_head in enumerate(kv_heads):
                of_kv_head = [entry_at[at] // width for at in heads[index * group :][:group] if at in entry_at]
                assert {head // (args.n_heads // args.n_kv_heads) for head in of_kv_head} == {kv_head}


@pytest.mark.parametrize("name", MODELS)
def test_padded_shards_have_one_length_and_hold_what_is_kept(name):
    args = args_of(name)
    for size in range(1, min(16, args.n_heads) + 1):
        for layer in (f"{ATTENTION}.wq", f"{ATTENTION}.wk", f"{ATTENTION}.wo", f"{FFN}.w2"):
            length = padded_length(args, f"{layer}.weight", size)
            for rank in range(size):
                one = shard(args, f"{layer}.weight", size, rank)
                inside = [position for kept in one.kept for position in kept]
                assert inside == sorted(set(inside))
                assert inside[-1] < length
                filled = [position + offset for position, entries in one.parts for offset in range(len(entries))]
                assert set(filled) <= set(inside)


@pytest.mark.parametrize("name", MODELS)
def test_where_everything_divides_every_rank_holds_the_same(name):
    args = args_of(name)
    for size in range(1, args.n_heads + 1):
        divides = args.n_heads % size == 0 and args.hidden_dim % (32 * size) == 0
        if divides and (args.n_kv_heads % size == 0 or size % args.n_kv_heads == 0):
            counts = {num_parameters_of_rank(args, size, rank) for rank in range(size)}
            assert len(counts) == 1, size
            assert local_kv_heads(args, size, 0) == max(1, args.n_kv_heads // size)


@pytest.mark.parametrize(
    ("name", "size", "queries", "kv_heads"),
    [
        ("70B", 3, 24, 3),  # 3 of 8 kv heads with all their queries
        ("70B", 6, 16, 2),
        ("70B", 7, 16, 2),
        ("70B", 12, 8, 1),  # half of the ranks have a kv head with all its queries, the others half of them
        ("7B", 5, 7, 7),
        ("3.1 8B", 16, 2, 1),
        ("demo", 2, 6, 2),
        ("demo", 4, 3, 1),
        ("demo", 5, 3, 1),
    ],
)
def test_the_busiest_rank_holds_the_cheapest_share(name, size, queries, kv_heads):
    args = args_of(name)
    every = [heads(args, size, rank) for rank in range(size)]
    assert max(sum(len(segment.queries) for segment in one) for one in every) == queries
    assert max(map(len, every)) == kv_heads


@pytest.mark.parametrize("name", MODELS)
def test_shares_of_the_feed_forward_differ_by_one_group_of_weights_at_most(name):
    args = args_of(name)
    for size in range(1, min(16, args.n_heads) + 1):
        lengths = [len(one) for one in held(args, f"{FFN}.w1.weight", size)]
        assert max(lengths) - min(lengths) in (0, feed_forward_step(args.hidden_dim, size)), size
        assert max(lengths) <= 1.05 * args.hidden_dim / size or feed_forward_step(args.hidden_dim, size) == 1
        if "B" in name and size <= 8:
            assert feed_forward_step(args.hidden_dim, size) == 32


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
    assert num_parameters_of_rank(args_of(name), 1, 0) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("7B", 6.738), ("13B", 13.016), ("70B", 68.977), ("3.1 8B", 8.030)])
def test_the_parameters_of_known_models(name, billions):
    assert num_parameters_of_rank(args_of(name), 1, 0) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 12])
def test_a_rank_holds_the_sum_of_its_shards(size, tied):
    args = ModelArgs(**{**TINY.to_dict(), "tied_embeddings": tied})
    for rank in range(size):
        total = 0
        for name, weight in meta_model(args).named_parameters():  # a tied weight is there once
            rows, columns = weight.shape if weight.dim() == 2 else (1, weight.numel())
            if kind_of(name) in (VOCAB_IN, VOCAB_OUT):
                rows = math.ceil(rows / size)
            elif kind_of(name) == COLUMN:
                rows = shard(args, name, size, rank).length
            elif kind_of(name) == ROW:
                columns = shard(args, name, size, rank).length
            total += rows * columns
        assert num_parameters_of_rank(args, size, rank) == total


def test_405b_is_split_over_twelve_ranks():
    """Its 128 query heads and 8 kv heads do not divide by 12: on paper, by hand."""
    args = ModelArgs(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, vocab_size=128256, multiple_of=4096, ffn_dim_multiplier=1.2
    )
    assert args.hidden_dim == 53248
    every = [heads(args, 12, rank) for rank in range(12)]
    assert {tuple(len(segment.queries) for segment in one) for one in every} == {(11,), (10,), (5, 6)}
    busiest = max(num_parameters_of_rank(args, 12, rank) for rank in range(12))
    assert busiest * 12 / num_parameters_of_rank(args, 1, 0) < 1.05


SHARES = [("70B", (24, 24, 16)), ("70B", (1, 40, 23)), ("7B", (17, 15)), ("13B", (20, 12, 8)), ("demo", (6, 2, 1))]


@pytest.mark.parametrize(("name", "shares"), SHARES)
def test_unequal_shares_are_a_partition_in_proportion_to_the_query_heads(name, shares):
    args = args_of(name)
    for weight in (f"{ATTENTION}.wq.weight", f"{FFN}.w2.weight", "tok_embeddings.weight"):
        parts = [shard(args, weight, shares, rank).parts for rank in range(len(shares))]
        entries = [[entry for _, held_here in one for entry in held_here] for one in parts]
        length = weight_shapes(args).get(weight)[tp_dim(weight)]
        assert [one for rank in entries for one in rank] == list(range(length)), weight
        if weight.endswith("wq.weight"):
            assert [len(one) for one in entries] == [share * args.head_dim for share in shares]
        elif weight.endswith("w2.weight"):
            exact = [length * share / args.n_heads for share in shares]
            assert all(abs(len(one) - wanted) <= 32 for one, wanted in zip(entries, exact, strict=True))
            assert all(len(one) <= 1.05 * wanted + 1 for one, wanted in zip(entries, exact, strict=True))
    for rank in range(len(shares)):
        for segment in heads(args, shares, rank):
            assert {query // (args.n_heads // args.n_kv_heads) for query in segment.queries} == {segment.kv_head}


@pytest.mark.parametrize(("name", "size"), [("70B", 8), ("7B", 4), ("3.1 8B", 2), ("demo", 3)])
def test_shares_that_are_equal_are_those_of_a_size(name, size):
    args = args_of(name)
    shares = (args.n_heads // size,) * size
    for rank in range(size):
        assert heads(args, shares, rank) == heads(args, size, rank)
        for weight in weight_shapes(args):
            if tp_dim(weight) is not None and (".0." in weight or "layers" not in weight):
                assert shard(args, weight, shares, rank) == shard(args, weight, size, rank)


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        ((24, 24, 15), r"^tp_shares=\[24, 24, 15\] adds up to 63, but must add up to n_heads=64$"),
        ((64, 0), "must have at least one query head for every rank"),
        ((65, -1), "at least one query head"),
        ((), "at least one query head"),
    ],
)
def test_shares_that_leave_a_rank_or_a_head_over_are_refused(shares, reason):
    with pytest.raises(ValueError, match=reason):
        check_tp_size(args_of("70B"), shares)


@pytest.mark.parametrize(("name", "ranks"), [("70B", 3), ("demo", 2), ("demo", 5), ("3.2 1B", 6), *SHARES])
def test_a_compact_shard_has_the_same_entries_at_the_positions_that_are_kept(name, ranks):
    args = args_of(name)
    count = ranks if isinstance(ranks, int) else len(ranks)
    for layer in (f"{ATTENTION}.wq", f"{ATTENTION}.wk", f"{FFN}.w2"):
        for rank in range(count):
            padded = shard(args, f"{layer}.weight", ranks, rank)
            compact = padded.compact
            assert compact.kept == (range(padded.length),)
            kept = [position for one in padded.kept for position in one]
            found = {
                kept.index(position + offset): entry
                for position, entries in padded.parts
                for offset, entry in enumerate(entries)
            }
            assert found == {
                position + offset: entry for position, entries in compact.parts for offset, entry in enumerate(entries)
            }
