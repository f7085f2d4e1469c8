"""What is written to a slot is read from it, alone, as part of a run, or page by page."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.model.attention.sdpa import slot_mapping
from llama_tp.model.kv_cache import KVCache, PageList, SlotRange

K, D, PAGE, PAGES = 3, 4, 5, 8


@pytest.fixture
def cache():
    """Every number in it is another one; keys are negative."""
    cache = KVCache(
        n_layers=2,
        num_pages=PAGES,
        page_size=PAGE,
        num_kv_heads=K,
        head_dim=D,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    slots = torch.arange(PAGES * PAGE)
    values = value_of(slots)
    cache.layers[1].write(((slice(0, len(slots)), slots),), -values, values)
    return cache


def value_of(slots):
    """(..., K, d)"""
    return slots[..., None, None] * 100.0 + torch.arange(K)[:, None] * 10 + torch.arange(D)


def check(found, slots):
    """Slots (B, S) were read."""
    k, v = found
    torch.testing.assert_close(v, value_of(slots).transpose(1, 2), atol=0, rtol=0)
    torch.testing.assert_close(k, -v, atol=0, rtol=0)


def test_a_layer_is_written_alone(cache):
    assert cache.layers[1].v.any()
    assert not cache.layers[0].v.any()
    assert cache.nbytes == 2 * 2 * PAGES * PAGE * K * D * 4 == 2 * PAGES * PAGE * cache.bytes_per_slot


@pytest.mark.parametrize(
    ("wanted", "slots"),
    [
        (SlotRange(7, 6), [range(7, 13)]),
        (SlotRange(2, 9, count=3, stride=10), [range(2, 11), range(12, 21), range(22, 31)]),
        (SlotRange(4, 3, count=2), [range(4, 7), range(4, 7)]),
    ],
)
def test_ranges_are_read_in_place(cache, wanted, slots):
    found = cache.layers[1].read(wanted)
    check(found, torch.tensor([list(row) for row in slots]))
    assert found[0].untyped_storage().data_ptr() == cache._data.untyped_storage().data_ptr()


def test_pages_are_gathered_in_their_order(cache):
    table = torch.tensor([[6, 0, 3], [1, 1, 7]])
    slots = (table.unsqueeze(-1) * PAGE + torch.arange(PAGE)).flatten(1)
    check(cache.layers[1].read(cache.gathered(table, 3 * PAGE)), slots)
    check(cache.layers[1].read(cache.gathered(table, 12)), slots[:, :12])
    check(cache.layers[1].read(cache.gathered(table[:1], 11, count=4)), slots[:1, :11].expand(4, -1))


def test_neighbours_are_written_in_one_piece_and_all_others_one_by_one(cache):
    # of the fourth sequence, the first page ends before the second begins; the last is padding
    slots = [[30], [22], [10, 11, 12, 13], [4, 25, 26], [0, 1], [39]]
    indices = torch.tensor([slot for one in slots for slot in one])
    mapping = slot_mapping(slots, torch.device("cpu"))
    assert [(rows, where if isinstance(where, slice) else where.tolist()) for rows, where in mapping] == [
        (slice(0, 2), [30, 22]),
        (slice(2, 6), slice(10, 14)),
        (slice(6, 9), [4, 25, 26]),
        (slice(9, 11), slice(0, 2)),
        (slice(11, 12), [39]),
    ]
    k = torch.randn(12, 2 * K, D)[:, K:]
    cache.layers[0].write(mapping, k, -k)
    torch.testing.assert_close(cache.layers[0].k[indices], k, atol=0, rtol=0)
    torch.testing.assert_close(cache.layers[0].v[indices], -k, atol=0, rtol=0)
    assert cache.layers[0].k.any(-1).any(-1).sum() == 12


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=30))
def test_ranges_are_the_pages_however_they_were_set(updates):
    found, pages = PageList(PAGE), []
    for index, page in updates:
        index = min(index, len(pages))
        pages[index:] = [page]
        found.set(index, page)
        slots = [slot for page in pages for slot in range(page * PAGE, page * PAGE + PAGE)]
        pairs = list(zip(found.ranges[::2], found.ranges[1::2], strict=True))
        assert found.pages == pages
        assert [slot for first, length in pairs for slot in range(first, first + length)] == slots
        assert all(one[0] + one[1] != two[0] for one, two in pairwise(pairs)), "contiguous ranges are one"
        for length in (1, PAGE, len(slots) - 1, len(slots)):
            whole = found.ranges_of(length, limit=99)
            assert [slot for one in whole for slot in range(one.first, one.first + one.length)] == slots[:length]
            assert found.ranges_of(length, limit=len(whole)) == whole
            assert found.ranges_of(length, limit=len(whole) - 1) == []
