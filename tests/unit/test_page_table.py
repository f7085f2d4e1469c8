"""Wherever a sequence's pages lie, its query sees its own keys and no others, in as few calls as that allows."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from llama_tp.engine import page_table
from llama_tp.engine.page_table import PageTable
from llama_tp.engine.request import Chunk
from llama_tp.model import attention as attention_module
from llama_tp.model.attention import attention
from llama_tp.model.kv_cache import KVCache, Pages, Run

K, D, PAGE = 2, 8, 4


def cache_of(num_pages, dtype=torch.float32, **changes):
    shape = {"n_layers": 1, "page_size": PAGE, "num_kv_heads": K, "head_dim": D, "device": "cpu"}
    cache = KVCache(**{**shape, **changes}, num_pages=num_pages, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, num_pages * PAGE, K, D, generator=generator, dtype=torch.float32).to(dtype)
    cache.layers[0].write(((slice(0, len(values[0])), slice(0, len(values[0]))),), *values)
    return cache


def table_of(cache, rows, *, many_bytes=False, monkeypatch=None):
    """A page table with these pages in its rows; `many_bytes`: as if each key were so large that copies never pay."""
    if many_bytes:
        monkeypatch.setattr(page_table, "_GATHER_BYTES", 0)
    table = PageTable(cache, num_rows=len(rows))
    for row, pages in enumerate(rows):
        for index, page in enumerate(pages):
            table.set(row, index, page)
    return table


def decodes(lengths):
    return [Chunk(row, length - 1, (0,), sample=True) for row, length in enumerate(lengths)]


def check_attention(cache, rows, chunks, spans, *, groups=3, atol=1e-6):
    """The spans give what each sequence gives by itself, with its keys looked up one by one."""
    layer = cache.layers[0]
    num_tokens = sum(len(chunk.tokens) for chunk in chunks)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(num_tokens, K * groups, D, generator=generator).to(cache.dtype)
    found = attention(q, layer, spans)
    at = 0
    for chunk in chunks:
        end = chunk.start + len(chunk.tokens)
        slots = [rows[chunk.row][position // PAGE] * PAGE + position % PAGE for position in range(end)]
        k, v = (part[slots].transpose(0, 1).unsqueeze(0).float() for part in (layer.k, layer.v))
        queries = q[at : at + len(chunk.tokens)].float().transpose(0, 1).unsqueeze(0)
        visible = torch.arange(end) <= torch.arange(chunk.start, end).unsqueeze(1)
        expected = F.scaled_dot_product_attention(queries, k, v, attn_mask=visible, enable_gqa=True)
        torch.testing.assert_close(
            found[at : at + len(chunk.tokens)].float(), expected[0].transpose(0, 1), atol=atol, rtol=0
        )
        at += len(chunk.tokens)


@pytest.mark.parametrize("groups", [1, 3])
def test_sequences_behind_one_prefix_read_it_once(monkeypatch, groups):
    rows = [[2, 3, 4, 10], [2, 3, 4, 14, 15], [2, 3, 4, 18]]
    cache = cache_of(24)
    table = table_of(cache, rows, many_bytes=True, monkeypatch=monkeypatch)
    chunks = decodes([15, 18, 13])
    (span,) = table.spans(chunks)
    assert span.shared == (Run(8, 12),)
    assert span.keys == Run(40, 6, count=3, stride=16)
    check_attention(cache, rows, chunks, (span,), groups=groups)


def test_a_sequence_of_several_runs_reads_each_in_place(monkeypatch):
    rows = [[5, 2, 3, 9, 10]]
    cache = cache_of(12)
    chunks = decodes([19])
    (span,) = table_of(cache, rows, many_bytes=True, monkeypatch=monkeypatch).spans(chunks)
    assert (span.shared, span.keys) == ((Run(20, 4), Run(8, 8)), Run(36, 7))
    check_attention(cache, rows, chunks, (span,))


def test_what_would_cost_more_calls_than_it_holds_is_gathered_together():
    rows = [[5, 2], [7, 1, 3], [6]]
    cache = cache_of(8)
    chunks = decodes([8, 11, 3])
    scattered, alone = table_of(cache, rows).spans(chunks)
    assert isinstance(scattered.keys, Pages)
    assert (scattered.rows, scattered.shared) == (slice(0, 2), ())
    assert alone.keys == Run(24, 3), "it lies together"
    check_attention(cache, rows, chunks, (scattered, alone))


def test_a_page_that_is_given_early_makes_no_run():
    rows = [[1, 2, 7]]
    cache = cache_of(8)
    (span,) = table_of(cache, rows).spans(decodes([8]))
    assert (span.shared, span.keys) == ((), Run(4, 8))


def test_a_prompt_behind_a_prefix_sees_it():
    rows = [[1, 2, 6, 7], [3]]
    cache = cache_of(8)
    chunks = [Chunk(1, 2, (0,), sample=True), Chunk(0, 8, (0,) * 7, sample=True)]
    check_attention(cache, rows, chunks, table_of(cache, rows).spans(chunks))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("many_bytes", [False, True])
def test_any_pages_of_any_sequences_give_what_each_gives_alone(monkeypatch, many_bytes, dtype, atol):
    random_ = random.Random(2)
    cache = cache_of(64, dtype)
    shared_spans = 0
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
        chunks = [Chunk(row, lengths[row] - 1, (0,), sample=True) for row in order]
        spans = table_of(cache, rows, many_bytes=many_bytes, monkeypatch=monkeypatch).spans(chunks)
        shared_spans += any(span.shared for span in spans)
        check_attention(cache, rows, chunks, spans, groups=random_.choice([1, 2, 3]), atol=atol)
    assert shared_spans > 20 if many_bytes else shared_spans == 0


def test_half_precision_without_instructions_reads_shared_runs_too(monkeypatch):
    monkeypatch.setattr(attention_module, "lacks_kernels", lambda tensor: True)
    rows = [[2, 3, 4, 10], [2, 3, 4, 14]]
    cache = cache_of(16, torch.bfloat16)
    chunks = decodes([15, 14])
    spans = table_of(cache, rows, many_bytes=True, monkeypatch=monkeypatch).spans(chunks)
    check_attention(cache, rows, chunks, spans, groups=1, atol=2e-2)
