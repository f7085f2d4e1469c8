"""Attention: SDPA's kernel choice for the engine's calls, the prototype's kernel, and chunks with grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import kernels
from gpu.device import (
    CUDA,
    DEVICE,
    DTYPE,
    MAX_ERROR,
    SMOKE,
    call_us,
    cudnn_attention,
    graph_us,
    randn,
    relative_error,
    seconds_of,
    sync,
)  # fmt: skip
from gpu.hardware import backend_name
from gpu.report import Report
from llama_tp.model.attention.sdpa import attend_masked_chunk

Call = dict[str, Any]
"""Arguments of SDPA."""


def sdpa(r: Report) -> None:
    """Which kernel SDPA chooses for the engine's calls, and the cost of a new length."""
    for label, heads, kv_heads in (("mha", 4, 4), ("gqa", 4, 1)) if SMOKE else (("mha", 32, 32), ("gqa", 32, 8)):
        for name, case in _sdpa_cases(heads, kv_heads).items():
            for cudnn in (True, False) if CUDA else (False,):
                with cudnn_attention(cudnn):
                    r.guard(f"{label}: {name}{'' if cudnn else ' (no cudnn)'}", lambda: _measure_sdpa(case))


def _sdpa_cases(heads: int, kv_heads: int) -> dict[str, Callable[[int], Call]]:
    """Name -> function that makes the call for the i-th of several lengths."""
    d, slots, scale = (16, 512, 16) if SMOKE else (128, 40960, 1)
    count, stride = (4, 64) if SMOKE else (32, 1024)
    cache_k, cache_v = randn(kv_heads, slots, d), randn(kv_heads, slots, d)

    def keys_and_values(count: int, length: int, stride: int) -> Call:
        shape, strides = (count, kv_heads, length, d), (stride * d, slots * d, d, 1)
        return {"key": cache_k.as_strided(shape, strides), "value": cache_v.as_strided(shape, strides)}

    def no_mask(count: int, length: int) -> Tensor:
        return torch.zeros(count, 1, 1, length, dtype=DTYPE, device=DEVICE)

    def decode_one(i: int) -> Call:
        return dict(query=randn(1, kv_heads, heads // kv_heads, d), **keys_and_values(1, 500 // scale + i, 0))

    def decode_many(i: int) -> Call:
        length = 500 // scale + i
        query = randn(count, kv_heads, heads // kv_heads, d)
        return dict(query=query, attn_mask=no_mask(count, length), **keys_and_values(count, length, stride))

    def chunk_of(tokens: int) -> Tensor:
        return randn(tokens, heads + kv_heads, d)[:, :heads].transpose(0, 1).unsqueeze(0)

    def prefill(i: int) -> Call:
        length = (512 - 16 * i) // scale
        return dict(query=chunk_of(length), is_causal=True, enable_gqa=True, **keys_and_values(1, length, 0))

    def prefill_after(i: int) -> Call:
        tokens, length = 512 // scale, (1536 + 16 * i) // scale
        return dict(query=chunk_of(tokens), attn_mask=chunk_mask(tokens, length), enable_gqa=True,
                    **keys_and_values(1, length, 0))  # fmt: skip

    def deterministic(i: int) -> Call:
        length = 64 * (1 + i)
        return dict(query=randn(16, kv_heads, 16, d), attn_mask=no_mask(16, length), **keys_and_values(16, length, 0))

    return {
        "decode, one sequence": decode_one,
        f"decode, {count} in one masked call": decode_many,
        "prefill from 0": prefill,
        "prefill chunk after 1024": prefill_after,
        "deterministic: 16 queries, stride 0": deterministic,
    }


def chunk_mask(tokens: int, length: int) -> Tensor:
    """Causal mask for the last `tokens` of `length` tokens."""
    hidden = torch.arange(length, device=DEVICE) > torch.arange(length - tokens, length, device=DEVICE).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=DTYPE, device=DEVICE).masked_fill_(hidden, float("-inf"))


def _measure_sdpa(case: Callable[[int], Call]) -> dict[str, Any]:
    def attend(call: Call) -> Tensor:
        out = F.scaled_dot_product_attention(**call)
        sync()
        return out

    first = []
    for i in range(4):
        call = case(i)
        sync()
        first.append(round(1e3 * seconds_of(lambda: attend(call)), 2))
    call = case(3)
    again = call_us(lambda: F.scaled_dot_product_attention(**call))
    found: dict[str, Any] = {"first_call_ms_of_new_lengths": first, "again_us": round(again, 1)}
    if CUDA:
        choice = torch._fused_sdp_choice(
            call["query"], call["key"], call["value"], call.get("attn_mask"), 0.0, call.get("is_causal", False),
            enable_gqa=call.get("enable_gqa", False),
        )  # fmt: skip
        found["backend"] = backend_name(choice)
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in call.items()}
    found["error"] = relative_error(attend(call), attend(wide))
    return found


def gqa_chunk(r: Report) -> None:
    """A chunk after a context with grouped queries, as the engine computes it, against SDPA with enable_gqa."""
    d, heads, kv_heads = (16, 4, 2) if SMOKE else (128, 32, 8)
    for tokens, length in ((8, 24),) if SMOKE else ((512, 1536), (512, 8192), (2048, 8192)):
        q, k, v = randn(tokens, heads, d), randn(1, kv_heads, length, d), randn(1, kv_heads, length, d)
        mask = chunk_mask(tokens, length)

        def ours() -> Tensor:
            return attend_masked_chunk(q, k, v, mask)

        def enable_gqa() -> Tensor:
            query = q.transpose(0, 1)[None]
            return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        with cudnn_attention(False):
            error = relative_error(ours(), enable_gqa())
            r.expect(f"{tokens} of {length}: difference", error < MAX_ERROR[DTYPE], error)
            for name, function in (("ours", ours), ("enable_gqa", enable_gqa)):
                r.guard(f"{tokens} of {length}: {name}", lambda: _time_and_memory(function))


def _time_and_memory(function: Callable[[], Any]) -> dict[str, float]:
    found = {"us": round(call_us(function), 1)}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        found["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return found


class _PagedCache:
    """Keys and values of `batch` sequences of one length, on pages in random order; several copies exceed the L2."""

    page_size = 16

    def __init__(self, batch: int, length: int, heads: int, kv_heads: int, d: int) -> None:
        self.batch, self.length, self.heads, self.kv_heads, self.d = batch, length, heads, kv_heads, d
        self.nbytes = 4 * batch * length * kv_heads * d
        copies = max(1, min(8, int(2e8 / self.nbytes))) if CUDA else 1
        self.pages = batch * -(-length // self.page_size)
        shape = (kv_heads, self.pages * self.page_size, d)
        self.copies = [(randn(*shape), randn(*shape)) for _ in range(copies)]
        self.table = torch.randperm(self.pages, device=DEVICE).view(batch, -1).int()
        self.pos = torch.full((batch,), length - 1, dtype=torch.int32, device=DEVICE)
        self.q = randn(batch, heads, d)

    def rate(self, attend: Callable[[Tensor, Tensor], Tensor], exact: Tensor) -> dict[str, float]:
        """`exact`: the expected result for the first few sequences."""
        error = _checked_error(attend(*self.copies[0])[: exact.size(0)], exact)
        us = graph_us(lambda: [attend(k, v) for k, v in self.copies], 10) / len(self.copies)
        return {"us": round(us, 1), "gb_s": round(self.nbytes / us / 1e3, 1), "error": error}

    def exact(self, slots_of: Callable[[int], Tensor]) -> Tensor:
        """In float32, for the first few sequences, given their slots."""
        k, v = self.copies[0]
        rows = self.q.view(self.batch, self.kv_heads, -1, self.d).float()
        out = []
        for b in range(min(self.batch, 4)):
            slots = slots_of(b)
            one = F.scaled_dot_product_attention(rows[b], k[:, slots].float(), v[:, slots].float())
            out.append(one.reshape(1, self.heads, self.d))
        return torch.cat(out)

    def paged_slots(self, b: int) -> Tensor:
        n = torch.arange(self.length, device=DEVICE)
        return self.table[b, n // self.page_size].long() * self.page_size + n % self.page_size


def _checked_error(ours: Tensor, exact: Tensor) -> float:
    error = relative_error(ours, exact)
    if not error < MAX_ERROR[DTYPE]:
        raise ValueError(f"the result is wrong: a relative error of {error}")
    return error


_LAUNCHES: tuple[dict[str, Any], ...] = (
    {"block": 64, "warps": 4},
    {"block": 128, "warps": 4},
    {"block": 32, "warps": 4},
    {"block": 64, "warps": 4, "dot": True},
    {"block": 128, "warps": 8, "dot": True},
    {"block": 64, "warps": 4, "splits": 1},
)


def attention(r: Report) -> None:
    """Decode attention of one layer, by kernel: GB/s of keys and values. And a prefill chunk by FlashAttention 2."""
    cases = [("gqa", 4, 2)] if SMOKE else [("mha", 32, 32), ("gqa", 32, 8), ("70B at TP 8", 8, 1)]
    sizes = ((2, 40),) if SMOKE else ((1, 512), (1, 2048), (32, 512), (128, 512), (32, 2048))
    for label, heads, kv_heads in cases:
        for batch, length in sizes:
            cache = _PagedCache(batch, length, heads, kv_heads, 16 if SMOKE else 128)
            name = f"{label} B={batch} c={length}"
            exact = cache.exact(cache.paged_slots)
            for options in _LAUNCHES[:1] if SMOKE else _LAUNCHES:

                def attend(k: Tensor, v: Tensor) -> Tensor:
                    return kernels.paged_decode(cache.q, k, v, cache.table, cache.pos, page_size=cache.page_size,
                                                most=length, **options)  # fmt: skip

                shown = " ".join(f"{key}={value}" for key, value in options.items())
                r.guard(f"{name}: triton {shown}", lambda: cache.rate(attend, exact))
            if CUDA:
                r.guard(f"{name}: aten flash varlen, seqused_k, starts in any order", lambda: _flash_rate(cache))
    if CUDA:
        for tokens, context in ((512, 0), (512, 1536), (2048, 0), (2048, 6144)):
            r.guard(f"flash varlen prefill of {tokens} after {context}", lambda: _flash_prefill(tokens, context))


def _flash_rate(cache: _PagedCache) -> dict[str, float]:
    """PyTorch's FlashAttention 2: contiguous slots anywhere in the cache, lengths on the device."""
    batch, length = cache.batch, cache.length
    order = torch.randperm(batch, device=DEVICE) * (cache.pages // batch * cache.page_size)
    starts = torch.cat([order, order.new_tensor([cache.pages * cache.page_size])]).int()
    used = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    cu_q = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)

    def flash(k: Tensor, v: Tensor) -> Tensor:
        return _flash(cache.q, k, v, cu_q, starts, used, 1, length, causal=False)

    first = starts.tolist()
    exact = cache.exact(lambda b: torch.arange(first[b], first[b] + length, device=DEVICE))
    return cache.rate(flash, exact)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    starts: Tensor,
    used: Tensor,
    most_q: int,
    most_k: int,
    *,
    causal: bool,
) -> Tensor:
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, starts, most_q, most_k, 0.0, causal, False, seqused_k=used
    )[0]


def _flash_prefill(tokens: int, context: int) -> dict[str, float]:
    """A chunk after a context, with a bottom-right causal mask."""
    heads, kv_heads, d, first, slots = 32, 8, 128, 4096, 16384
    k, v, q = randn(kv_heads, slots, d), randn(kv_heads, slots, d), randn(tokens, heads, d)
    length = tokens + context
    cu_q, starts, used = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([0, tokens], [first, slots], [length])
    )

    def prefill() -> Tensor:
        return _flash(q, k, v, cu_q, starts, used, tokens, length, causal=True)

    wide_k, wide_v = (part[None, :, first : first + length].float() for part in (k, v))
    mask = chunk_mask(tokens, length).float()
    exact = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None].float(), wide_k, wide_v, attn_mask=mask, enable_gqa=True
    )
    error = _checked_error(prefill(), exact[0].transpose(0, 1))
    us = graph_us(prefill, 10)
    tflops = 4 * heads * d * tokens * (context + tokens / 2) / us / 1e6
    return {"us": round(us, 1), "tflops": round(tflops, 1), "error": error}
