"""Wherever a sequence's pages lie, its query sees its own keys and no others, in as few calls as that allows."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from llama_tp.model.attention.base import SequenceTokens
from llama_tp.model.attention.planner import SdpaCosts
from llama_tp.model.attention.sdpa import SdpaBackend, SdpaStep
from llama_tp.model.kv_cache import GatheredPages, KVCache, PageList, SlotRange

K, D, PAGE = 2, 8, 4
COPIES_NEVER_PAY = SdpaCosts(gather_bytes=0)


def cache_of(num_pages, dtype=torch.float32, **changes):
    shape = {"n_layers": 1, "page_size": PAGE, "num_kv_heads": K, "head_dim": D, "device": "cpu"}
    cache = KVCache(**{**shape, **changes}, num_pages=num_pages, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, num_pages * PAGE, K, D, generator=generator, dtype=torch.float32).to(dtype)
    cache.layers[0].write(((slice(0, len(values[0])), slice(0, len(values[0]))),), *values)
    return cache


def pages_of(pages):
    found = PageList(PAGE)
    for index, page in enumerate(pages):
        found.set(index, page)
    return found


def decodes(rows, lengths):
    return [SequenceTokens(pages_of(pages), length - 1, 1) for pages, length in zip(rows, lengths, strict=True)]


def prepare(cache, sequences, costs=None, **options):
    return SdpaBackend(cache, costs=costs, **options).prepare(sequences)


def check_attention(cache, sequences, step, *, groups=3, atol=1e-6):
    """The step gives what each sequence gives by itself, with its keys looked up one by one."""
    layer = cache.layers[0]
    num_tokens = sum(one.num_tokens for one in sequences)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(num_tokens, K * groups, D, generator=generator).to(cache.dtype)
    k, v = torch.randn(2, num_tokens, K, D, generator=generator).to(cache.dtype)
    found = step(q, k, v, layer)
    at = 0
    for one in sequences:
        end, after = one.start + one.num_tokens, at + one.num_tokens
        pages = one.pages.pages
        slots = [pages[position // PAGE] * PAGE + position % PAGE for position in range(end)]
        assert torch.equal(layer.k[slots[one.start :]], k[at:after])
        keys, values = (part[slots].transpose(0, 1).unsqueeze(0).float() for part in (layer.k, layer.v))
        queries = q[at:after].float().transpose(0, 1).unsqueeze(0)
        visible = torch.arange(end) <= torch.arange(one.start, end).unsqueeze(1)
        expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)
        torch.testing.assert_close(found[at:after].float(), expected[0].transpose(0, 1), atol=atol, rtol=0)
        at = after


@pytest.mark.parametrize("groups", [1, 3])
def test_sequences_behind_one_prefix_read_it_once(groups):
    cache = cache_of(24)
    sequences = decodes([[2, 3, 4, 10], [2, 3, 4, 14, 15], [2, 3, 4, 18]], [15, 18, 13])
    step = prepare(cache, sequences, COPIES_NEVER_PAY)
    (call,) = step.calls
    assert call.shared == (SlotRange(8, 12),)
    assert call.keys == SlotRange(40, 6, count=3, stride=16)
    check_attention(cache, sequences, step, groups=groups)


def test_a_sequence_of_several_ranges_reads_each_in_place():
    cache = cache_of(12)
    sequences = decodes([[5, 2, 3, 9, 10]], [19])
    step = prepare(cache, sequences, COPIES_NEVER_PAY)
    (call,) = step.calls
    assert (call.shared, call.keys) == ((SlotRange(20, 4), SlotRange(8, 8)), SlotRange(36, 7))
    check_attention(cache, sequences, step)


def test_where_results_cannot_be_merged_several_ranges_are_gathered():
    cache = cache_of(12)
    sequences = decodes([[5, 2, 3, 9, 10]], [19])
    step = prepare(cache, sequences, COPIES_NEVER_PAY, can_merge=False)
    (call,) = step.calls
    assert isinstance(call.keys, GatheredPages)
    check_attention(cache, sequences, step)


def test_what_would_cost_more_calls_than_it_holds_is_gathered_together():
    cache = cache_of(8)
    sequences = decodes([[5, 2], [7, 1, 3], [6]], [8, 11, 3])
    step = prepare(cache, sequences)
    scattered, alone = step.calls
    assert isinstance(scattered.keys, GatheredPages)
    assert (scattered.tokens, scattered.shared) == (slice(0, 2), ())
    assert alone.keys == SlotRange(24, 3), "it is contiguous"
    check_attention(cache, sequences, step)


def test_a_page_that_is_given_early_makes_no_range():
    (call,) = prepare(cache_of(8), decodes([[1, 2, 7]], [8])).calls
    assert (call.shared, call.keys) == ((), SlotRange(4, 8))


def test_a_prompt_behind_a_prefix_sees_it():
    cache = cache_of(8)
    sequences = [SequenceTokens(pages_of([3]), 2, 1), SequenceTokens(pages_of([1, 2, 6, 7]), 8, 7)]
    check_attention(cache, sequences, prepare(cache, sequences))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("costs", [SdpaCosts(), COPIES_NEVER_PAY], ids=["gathered", "read in place"])
def test_any_pages_of_any_sequences_give_what_each_gives_alone(costs, dtype, atol):
    random_ = random.Random(2)
    cache = cache_of(64, dtype)
    shared_calls = 0
    for _ in range(60):
        free = list(range(64))
        if random_.random() < 0.5:
            random_.shuffle(free)
        prefixes: list[list[int]] = [[], [free.pop(0) for _ in range(random_.randint(1, 4))]]
        rows = []
        for _ in range(random_.randint(1, 6)):
            prefix = random_.choice([*prefixes, *rows])
            prefix = prefix[: random_.randint(0, len(prefix))]
            rows.append([*prefix, *(free.pop(0) for _ in range(random_.randint(1, 4)))])
        lengths = [len(pages) * PAGE - random_.randrange(PAGE) for pages in rows]
        order = sorted(range(len(rows)), key=lambda row: (rows[row][0], rows[row][-1]))
        sequences = decodes([rows[row] for row in order], [lengths[row] for row in order])
        step = prepare(cache, sequences, costs)
        shared_calls += any(call.shared for call in step.calls)
        check_attention(cache, sequences, step, groups=random_.choice([1, 2, 3]), atol=atol)
    assert shared_calls > 20 if costs is COPIES_NEVER_PAY else shared_calls == 0


def test_half_precision_without_instructions_reads_shared_ranges_too():
    cache = cache_of(16, torch.bfloat16)
    sequences = decodes([[2, 3, 4, 10], [2, 3, 4, 14]], [15, 14])
    step = prepare(cache, sequences, COPIES_NEVER_PAY, fp32_fallback=True)
    check_attention(cache, sequences, step, groups=1, atol=2e-2)


def test_padding_is_written_where_nobody_reads():
    cache = cache_of(5)
    before = cache.layers[0].k[: 4 * PAGE].clone()
    step = SdpaBackend(cache, deterministic=True).prepare(decodes([[1]], [1]), num_padding=3)
    assert isinstance(step, SdpaStep)
    q, k = torch.randn(4, 2 * K, D), torch.randn(4, K, D)
    step(q, k, k, cache.layers[0])
    changed = (cache.layers[0].k[: 4 * PAGE] != before).any(-1).any(-1)
    assert changed.nonzero().flatten().tolist() == [PAGE]
