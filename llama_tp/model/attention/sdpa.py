"""Attention with scaled_dot_product_attention over ranges of slots, on any device.

Legend: T tokens of the step, B sequences, H heads, K kv heads, G = H / K, d head dim, S keys.

The cost follows the used length. Keys in contiguous slots are views of the cache, others are gathered; on a CPU a
shared prefix is read once for all its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.attention.base import SequenceTokens
from llama_tp.model.attention.planner import AttentionCall, CallPlanner, SdpaCosts
from llama_tp.model.fp32_fallback import needs_fp32, upcast
from llama_tp.model.kv_cache import KVCache, LayerCache, SlotMapping, SlotRange

_ALIGNED_QUERIES = 16
"""SDPA packs the scratch memory of its threads back to back, sized by the number of queries: with 3 queries, each
thread's is aligned differently, and BLAS sums in a different order."""


class SdpaBackend:
    """See `llama_tp.model.attention.base.AttentionBackend`.

    `can_merge`: whether results over several ranges of keys can be merged; SDPA's CPU kernel returns the sums needed.
    `deterministic`: every query attends alone, over a number of keys that depends only on its position, and padding is
    written to the cache's last page.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        costs: SdpaCosts | None = None,
        can_merge: bool = True,
        deterministic: bool = False,
        fp32_fallback: bool | None = None,
    ) -> None:
        """`fp32_fallback`: compute half precision in float32; None: if the CPU lacks instructions for it."""
        self._cache = cache
        self._costs = costs or SdpaCosts()
        self._planner = CallPlanner(cache, self._costs, can_merge=can_merge)
        self._deterministic = deterministic
        keys = cache.layers[0].k
        self._fp32_fallback = needs_fp32(keys.device, keys.dtype) if fp32_fallback is None else fp32_fallback
        self._scratch_slot = (cache.num_pages - 1) * cache.page_size

    def prepare(self, sequences: Sequence[SequenceTokens], *, num_padding: int = 0) -> SdpaStep:
        calls = self._planner.plan_fixed(sequences) if self._deterministic else self._planner.plan(sequences)
        slots = [one.pages.slots(one.start, one.start + one.num_tokens) for one in sequences]
        if num_padding:
            assert self._deterministic
            first = sum(map(len, slots))
            padding = SlotRange(self._scratch_slot, 1, count=num_padding)
            calls.append(AttentionCall(slice(first, first + num_padding), padding))
            slots.append([self._scratch_slot] * num_padding)
        return SdpaStep(calls, slot_mapping(slots, self._cache.device), self._costs, self._fp32_fallback)


class SdpaStep:
    """One step's layout: see `llama_tp.model.attention.base.StepAttention`."""

    __slots__ = ("_costs", "_fp32_fallback", "calls", "slot_mapping")

    def __init__(
        self, calls: Sequence[AttentionCall], slot_mapping: SlotMapping, costs: SdpaCosts, fp32_fallback: bool
    ) -> None:
        self.calls = calls
        self.slot_mapping = slot_mapping
        self._costs = costs
        self._fp32_fallback = fp32_fallback

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        cache.write(self.slot_mapping, k, v)
        if len(self.calls) == 1:
            return self._attend(q, cache, self.calls[0])
        out = torch.empty_like(q)
        for call in self.calls:
            out[call.tokens] = self._attend(q[call.tokens], cache, call)
        return out

    def _attend(self, q: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        k, v = cache.read(call.keys)  # (B, K, S, d)
        b, num_kv_heads, _, d = k.shape
        if q.size(0) == b:
            # One query each: the G heads that share a kv head become G queries of one head, so no key is read twice.
            groups = q.view(b, num_kv_heads, -1, d)  # (B, K, G, d)
            if call.aligned:
                size = groups.size(2)
                groups = F.pad(groups, (0, 0, 0, -size % _ALIGNED_QUERIES))
                return F.scaled_dot_product_attention(groups, k, v, attn_mask=call.mask)[:, :, :size].reshape(q.shape)
            if call.shared:
                return self._attend_ranges(groups, k, v, cache, call).reshape(q.shape)
            if groups.size(2) == 1 and self._fp32_fallback:
                return self._attend_upcast(groups, k, v, call.mask)[0].to(q.dtype).reshape(q.shape)
            return F.scaled_dot_product_attention(groups, k, v, attn_mask=call.mask).reshape(q.shape)
        if call.mask is not None and q.is_cuda:
            return attend_masked_chunk(q, k, v, call.mask)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=call.mask, is_causal=call.causal, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)

    def _attend_ranges(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """Queries (B, K, G, d) over their own keys (B, K, S, d) and over shared keys, which all B read as one sequence.

        Attention over several ranges is the mean of their results, weighted by their sums of exponentials (Hydragen,
        arXiv:2402.05099).
        """
        b, _, size, _ = q.shape
        out, lse = self._attend_range(q, k, v, call.mask)
        out = out.float()
        together = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, K, B * G, d)
        for keys in call.shared:
            part, part_lse = self._attend_range(together, *cache.read(keys))
            part, part_lse = (one[0].unflatten(1, (b, size)).transpose(0, 1) for one in (part, part_lse))
            out = torch.lerp(out, part.float(), torch.sigmoid(part_lse - lse).unsqueeze(-1))
            lse = torch.logaddexp(lse, part_lse)
        return out.to(q.dtype)

    def _attend_range(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """SDPA for queries (B, K, G, d), and its log-sum-exps (B, K, G)."""
        return self._attend_upcast(q, k, v, mask) if self._fp32_fallback else _flash(q, k, v, attn_mask=mask)

    def _attend_upcast(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for half precision on a CPU without instructions for it, upcasting a few heads at a time. SDPA
        converts one element at a time, which takes 2 to 3 times as long for a single query per kv head."""
        out = torch.empty_like(q, dtype=torch.float32)
        lse = out.new_empty(q.shape[:3])
        mask = None if mask is None else mask.float()
        step = max(1, self._costs.upcast_elements // (2 * k[:, 0].numel()))
        for head in range(0, q.size(1), step):
            heads = slice(head, head + step)
            wide_k, wide_v = upcast(k[:, heads], v[:, heads])
            out[:, heads], lse[:, heads] = _flash(q[:, heads].float(), wide_k, wide_v, attn_mask=mask)
        return out, lse


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The kernel behind SDPA on CPUs; it also returns the log-sum-exps."""


def attend_masked_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One sequence's queries (T, H, d) over keys (1, K, S, d) under a mask (T, S).

    With a mask and enable_gqa, CUDA only has the kernel that materializes all scores in float32. Treated as K sequences
    of G heads with the same keys, the memory-efficient kernel can compute this.
    """
    num_kv_heads = k.size(1)
    groups = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # (K, G, T, d)
    k, v = (part.transpose(0, 1).expand(-1, groups.size(1), -1, -1) for part in (k, v))
    out = F.scaled_dot_product_attention(groups, k, v, attn_mask=mask)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def slot_mapping(slots: Sequence[list[int]], device: torch.device) -> SlotMapping:
    """The slots to store each sequence's tokens in: a slice if several are contiguous, else indices (T,)."""
    flat = [slot for one in slots for slot in one]
    indices = torch.tensor(flat, dtype=torch.int64).to(device, non_blocking=True)
    mapping: list[tuple[slice, slice | Tensor]] = []
    first = at = 0  # tokens first .. at - 1 are written by index
    for one in slots:
        end = at + len(one)
        if len(one) > 1 and one[-1] - one[0] == len(one) - 1 and one == list(range(one[0], one[-1] + 1)):
            if first < at:
                mapping.append((slice(first, at), indices[first:at]))
            mapping.append((slice(at, end), slice(one[0], one[-1] + 1)))
            first = end
        at = end
    if first < at:
        mapping.append((slice(first, at), indices[first:at]))
    return tuple(mapping)
