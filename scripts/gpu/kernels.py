"""Prototype GPU kernels in Triton, each with a plain torch fallback for machines without Triton.

Every kernel can be launched with programmatic dependent launch (PDL, Hopper and newer): it then starts while the
previous kernel is still running, and waits for its results only where it reads them.

Legend: T tokens, B sequences, H heads, K kv heads, G = H / K, d head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.device import CUDA, INTERPRETED

# Kernel parameters are annotated with names that Triton can see from inside a kernel: only those of tl.
try:
    # On a CPU the kernels need Triton's interpreter.
    if not CUDA and not INTERPRETED:
        raise ImportError("no GPU")
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HAS_TRITON = triton is not None
HAS_PDL = False
if triton is not None and CUDA and torch.cuda.get_device_capability() >= (9, 0):
    try:
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

        HAS_PDL = True
    except ImportError:  # before triton 3.3
        pass


if triton is not None:
    if not HAS_PDL:

        @triton.jit
        def gdc_launch_dependents() -> None:
            pass

        @triton.jit
        def gdc_wait() -> None:
            pass

    @triton.jit
    def _read_kernel(x: tl.tensor, out: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
        pid = tl.program_id(0)
        acc = tl.zeros((BLOCK,), dtype=tl.int32)
        step = tl.num_programs(0) * BLOCK
        for start in range(pid * BLOCK, n, step):
            offs = start + tl.arange(0, BLOCK)
            acc += tl.load(x + offs, mask=offs < n, other=0)
        tl.store(out + pid, tl.sum(acc, 0))

    @triton.jit
    def _gemv_kernel(
        x: tl.tensor, w: tl.tensor, y: tl.tensor, N: tl.tensor,
        KD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """Loads the first weights before the kernel that produces x has finished, and the next while it multiplies."""
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        cols = tl.arange(0, BK)
        base = w + rows[:, None].to(tl.int64) * KD
        is_row = (rows < N)[:, None]
        if PDL:
            gdc_launch_dependents()
        tile = tl.load(
            base + cols[None, :], mask=is_row & (cols < KD)[None, :], other=0.0, eviction_policy="evict_first"
        )
        if PDL:
            gdc_wait()
        acc = tl.zeros((BN, BK), dtype=tl.float32)
        for k in range(0, KD, BK):
            vector = tl.load(x + k + cols, mask=cols + k < KD, other=0.0).to(tl.float32)
            current = tile
            ahead = cols + k + BK
            tile = tl.load(
                base + ahead[None, :], mask=is_row & (ahead < KD)[None, :], other=0.0, eviction_policy="evict_first"
            )
            acc += current.to(tl.float32) * vector[None, :]
        tl.store(y + rows, tl.sum(acc, 1).to(y.dtype.element_ty), mask=rows < N)

    @triton.jit
    def _add_norm_kernel(
        x: tl.tensor, y: tl.tensor, w: tl.tensor, out: tl.tensor, eps: tl.tensor, D: tl.tensor,
        HAS_Y: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        row = tl.program_id(0).to(tl.int64) * D
        offs = tl.arange(0, BLOCK)
        ok = offs < D
        value = tl.load(x + row + offs, mask=ok, other=0.0)
        if HAS_Y:
            value += tl.load(y + row + offs, mask=ok, other=0.0).to(tl.float32)
            tl.store(x + row + offs, value, mask=ok)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
        weight = tl.load(w + offs, mask=ok, other=0.0)
        tl.store(out + row + offs, (value * scale * weight).to(out.dtype.element_ty), mask=ok)

    @triton.jit
    def _silu_mul_kernel(
        gate_up: tl.tensor, out: tl.tensor, FD: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr
    ) -> None:
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        row = tl.program_id(0).to(tl.int64)
        offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok = offs < FD
        gate = tl.load(gate_up + row * 2 * FD + offs, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * FD + FD + offs, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + row * FD + offs, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=ok)

    @triton.jit
    def _rope_write_kernel(
        qkv: tl.tensor, rope: tl.tensor, table: tl.tensor, pos: tl.tensor, q_out: tl.tensor, k_cache: tl.tensor,
        v_cache: tl.tensor, stride_kh: tl.tensor, stride_table: tl.tensor,
        H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PS: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """Rotate queries and keys (Meta's layout: adjacent pairs), and store keys and values in their slots."""
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        t, h = tl.program_id(0), tl.program_id(1)
        p = tl.load(pos + t)
        slot = tl.load(table + t * stride_table + p // PS).to(tl.int64) * PS + p % PS
        half = tl.arange(0, D // 2)
        source = qkv + (t * (H + 2 * K) + h).to(tl.int64) * D
        even = tl.load(source + 2 * half).to(tl.float32)
        odd = tl.load(source + 2 * half + 1).to(tl.float32)
        if h < H + K:
            cos = tl.load(rope + p * D + 2 * half)
            sin = tl.load(rope + p * D + 2 * half + 1)
            real, imaginary = even * cos - odd * sin, even * sin + odd * cos
        else:
            real, imaginary = even, odd
        if h < H:
            target = q_out + (t * H + h).to(tl.int64) * D
            tl.store(target + 2 * half, real.to(q_out.dtype.element_ty))
            tl.store(target + 2 * half + 1, imaginary.to(q_out.dtype.element_ty))
        elif h < H + K:
            target = k_cache + (h - H).to(tl.int64) * stride_kh + slot * D
            tl.store(target + 2 * half, real.to(k_cache.dtype.element_ty))
            tl.store(target + 2 * half + 1, imaginary.to(k_cache.dtype.element_ty))
        else:
            target = v_cache + (h - H - K).to(tl.int64) * stride_kh + slot * D
            tl.store(target + 2 * half, real.to(v_cache.dtype.element_ty))
            tl.store(target + 2 * half + 1, imaginary.to(v_cache.dtype.element_ty))

    @triton.jit
    def _paged_decode_kernel(
        q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, table: tl.tensor, pos: tl.tensor, out: tl.tensor,
        part: tl.tensor, lse: tl.tensor, scale: tl.tensor, stride_kh: tl.tensor, stride_table: tl.tensor,
        K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, PS: tl.constexpr, BN: tl.constexpr,
        SPLITS: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """One query per sequence over pages: the G heads of a kv head together, SPLITS parts of the keys in parallel.

        `scale` is log2(e) / sqrt(D): all exponentials are powers of two.
        """
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        b, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        length = tl.load(pos + b) + 1
        per = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
        low = s * per
        high = tl.minimum(low + per, length)
        d = tl.arange(0, D)
        g = tl.arange(0, GP)
        heads = (b * K + h) * G + g
        query = tl.load(q + heads[:, None].to(tl.int64) * D + d[None, :], mask=(g < G)[:, None], other=0.0)
        top = tl.full((GP,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((GP,), dtype=tl.float32)
        acc = tl.zeros((GP, D), dtype=tl.float32)
        base = h.to(tl.int64) * stride_kh
        for start in range(low, high, BN):
            n = start + tl.arange(0, BN)
            ok = n < high
            page = tl.load(table + b * stride_table + n // PS, mask=ok, other=0)
            at = base + (page.to(tl.int64) * PS + n % PS) * D
            keys = tl.load(k_cache + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
            if GP == 1:
                score = tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)[None, :]
            else:
                score = tl.dot(query, tl.trans(keys))
            score = tl.where(ok[None, :], score * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new_top[:, None])
            old = tl.exp2(top - new_top)
            values = tl.load(v_cache + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
            total = total * old + tl.sum(weight, 1)
            if GP == 1:
                acc = acc * old[:, None] + tl.sum(tl.trans(weight) * values.to(tl.float32), 0)[None, :]
            else:
                acc = acc * old[:, None] + tl.dot(weight.to(values.dtype), values)
            top = new_top
        safe = tl.where(total > 0, total, 1.0)
        result = acc / safe[:, None]
        if SPLITS == 1:
            where = out + heads[:, None].to(tl.int64) * D + d[None, :]
            tl.store(where, result.to(out.dtype.element_ty), mask=(g < G)[:, None])
        else:
            index = heads * SPLITS + s
            tl.store(part + index[:, None].to(tl.int64) * D + d[None, :], result, mask=(g < G)[:, None])
            tl.store(lse + index, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=g < G)

    @triton.jit
    def _combine_kernel(
        part: tl.tensor, lse: tl.tensor, out: tl.tensor, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
    ) -> None:
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        head = tl.program_id(0).to(tl.int64)
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, D)
        logs = tl.load(lse + head * SPLITS + s)
        weight = tl.exp2(logs - tl.max(logs, 0))
        parts = tl.load(part + (head * SPLITS + s)[:, None] * D + d[None, :])
        value = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out + head * D + d, value.to(out.dtype.element_ty))


def _launch(pdl: bool) -> dict[str, bool]:
    """Launch options. triton before 3.3 lacks launch_pdl, so it is passed only if needed."""
    assert HAS_PDL or not pdl, "needs Hopper and triton 3.3"
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def read(x: Tensor, out: Tensor, block: int, warps: int) -> None:
    """Read an entire int32 tensor with out.numel() programs."""
    _read_kernel[(out.numel(),)](x, out, x.numel(), BLOCK=block, num_warps=warps)


GemvShape = tuple[int, int, int]
"""Rows and columns of a program's tile, warps."""

GEMV_SHAPES: dict[int, GemvShape] = {
    1024: (1, 1024, 2), 3584: (1, 4096, 4), 4096: (1, 2048, 4), 5120: (1, 1024, 4), 8192: (1, 2048, 4),
    11008: (1, 4096, 4), 13824: (1, 1024, 4), 14336: (1, 2048, 4),
}  # fmt: skip
"""By input size: the fastest on H100 and H200 for 4096 and 11008 (section gemv), guesses for the others."""


def gemv(x: Tensor, w: Tensor, shape: GemvShape | None = None, pdl: bool = False) -> Tensor:
    """(1, in), (out, in) -> (1, out)."""
    if triton is None:
        return F.linear(x, w)
    num_out, num_in = w.shape
    rows, columns, warps = shape or GEMV_SHAPES.get(num_in) or (1, min(2048, triton.next_power_of_2(num_in)), 4)
    y = x.new_empty(1, num_out)
    _gemv_kernel[(triton.cdiv(num_out, rows),)](
        x, w, y, num_out, KD=num_in, BN=rows, BK=columns, num_warps=warps, **_launch(pdl)
    )
    return y


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, pdl: bool = False) -> Tensor:
    """x += y in place (the float32 residual stream), then RMSNorm of the sum, in the model's dtype."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if triton is None:
        if y is not None:
            x += y
        return out.copy_(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)
    width = x.size(-1)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(x.size(0),)](
        x, x if y is None else y, weight, out, eps, width, HAS_Y=y is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)), **_launch(pdl),
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:
    """(T, 2F) -> (T, F)."""
    width = gate_up.size(-1) // 2
    if triton is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out = gate_up.new_empty(gate_up.size(0), width)
    grid = (gate_up.size(0), triton.cdiv(width, 1024))
    _silu_mul_kernel[grid](gate_up, out, width, BLOCK=1024, num_warps=4, **_launch(pdl))
    return out


def rope_write(
    qkv: Tensor, rope: Tensor, table: Tensor, pos: Tensor, k: Tensor, v: Tensor, *, page_size: int, pdl: bool = False
) -> Tensor:
    """qkv (T, (H + 2K) d) -> rotated queries (T, H, d); stores keys and values in the cache, k and v (K, slots, d).

    rope is float32 (positions, d); table (T, pages) has one table row per token.
    """
    num_kv, _, d = k.shape
    tokens = qkv.size(0)
    heads = qkv.size(1) // d - 2 * num_kv
    if triton is None:
        parts = qkv.view(tokens, -1, d)
        angles = torch.view_as_complex(rope.view(-1, d // 2, 2))[pos.long()].unsqueeze(1)
        pairs = torch.view_as_complex(parts[:, : heads + num_kv].float().unflatten(-1, (-1, 2))) * angles
        qk = torch.view_as_real(pairs).flatten(-2).to(qkv.dtype)
        table_rows = torch.arange(tokens, device=qkv.device)
        slots = table[table_rows, pos.long() // page_size].long() * page_size + pos.long() % page_size
        k[:, slots] = qk[:, heads:].transpose(0, 1)
        v[:, slots] = parts[:, heads + num_kv :].transpose(0, 1)
        return qk[:, :heads].contiguous()
    q = qkv.new_empty(tokens, heads, d)
    _rope_write_kernel[(tokens, heads + 2 * num_kv)](
        qkv, rope, table, pos, q, k, v, k.stride(0), table.stride(0),
        H=heads, K=num_kv, D=d, PS=page_size, num_warps=1, **_launch(pdl),
    )  # fmt: skip
    return q


def paged_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, pos: Tensor, *, page_size: int, most: int,
    splits: int = 0, block: int = 64, warps: int = 4, stages: int = 3, dot: bool = False, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """q (B, H, d) over pages of k, v (K, slots, d); sequence b sees keys 0 .. pos[b]; `most`: keys of the longest one.

    `dot`: use tensor cores even if a kv head has a single query, padded to 16.
    """
    batch, heads, d = q.shape
    num_kv = k.size(0)
    group = heads // num_kv
    out = torch.empty_like(q)
    if triton is None:
        for b in range(batch):
            n = torch.arange(int(pos[b]) + 1, device=q.device)
            slots = table[b, n // page_size].long() * page_size + n % page_size
            rows = q[b].view(num_kv, group, d)
            out[b] = F.scaled_dot_product_attention(rows, k[:, slots], v[:, slots]).reshape(heads, d)
        return out
    splits = splits or _splits_for(batch, num_kv, most)
    part = lse = out
    if splits > 1:
        part = torch.empty(batch * heads, splits, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch * heads, splits, dtype=torch.float32, device=q.device)
    padded = 1 if group == 1 and not dot else max(16, triton.next_power_of_2(group))
    _paged_decode_kernel[(batch, num_kv, splits)](
        q, k, v, table, pos, out, part, lse, math.log2(math.e) / math.sqrt(d), k.stride(0), table.stride(0),
        K=num_kv, G=group, GP=padded, D=d, PS=page_size, BN=block, SPLITS=splits,
        num_warps=warps, num_stages=stages, **_launch(pdl),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(batch * heads,)](part, lse, out, D=d, SPLITS=splits, num_warps=1, **_launch(pdl))
    return out


_NUM_SMS = 132


def _splits_for(batch: int, num_kv: int, most: int) -> int:
    """Parts to split the keys into, to occupy every multiprocessor: a power of two."""
    wanted = max(1, 4 * _NUM_SMS // (batch * num_kv))
    return max(1, min(32, 1 << (wanted.bit_length() - 1), 1 << max(0, (most // 64).bit_length() - 1)))
