"""Attention over the paged KV cache, behind one interface for every device."""

from __future__ import annotations

from llama_tp.model.attention.base import AttentionBackend, SequenceTokens, StepAttention
from llama_tp.model.attention.sdpa import SdpaBackend
from llama_tp.model.kv_cache import KVCache

__all__ = ["AttentionBackend", "SequenceTokens", "StepAttention", "choose_backend"]


def choose_backend(cache: KVCache, *, deterministic: bool) -> AttentionBackend:
    """The backend for the cache's device. `deterministic`: see SdpaBackend; the cache's last page is then scratch."""
    return SdpaBackend(cache, can_merge=cache.device.type == "cpu", deterministic=deterministic)
