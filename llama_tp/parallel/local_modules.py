"""Local modules of the sharded model: plain tensors, and a `Comm` where ranks communicate.

Legend: T tokens, D model dim, F local hidden dim, H local heads, K local kv heads, d head dim, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llama_tp.model.linear import Linear
from llama_tp.model.norm import HeadNorm
from llama_tp.model.transformer import Attention, FeedForward
from llama_tp.parallel.comm import Comm


class RowLinear(nn.Module):
    """A linear layer with its input dim split over the ranks, completed by one all-reduce; a bias is added after it."""

    def __init__(self, linear: Linear, comm: Comm, bias: Tensor | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.comm = comm
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.comm.all_reduce(self.linear(x))
        return y if self.bias is None else y + self.bias


class FusedAttention(Attention):
    """Attention with one projection for queries, keys and values; wqkv is (H*d + 2*K*d, D), qk_norm has H + K heads."""

    def __init__(
        self, *, wqkv: Linear, wo: RowLinear, num_kv_heads: int, head_dim: int, qk_norm: HeadNorm | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.wqkv = wqkv
        self.wo = wo  # type: ignore[assignment]
        self.qk_norm = qk_norm
        self.head_dim = head_dim
        num_heads = wqkv.out_features // head_dim
        self.split = (num_heads - num_kv_heads, num_kv_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qk, v = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(self.split, dim=1)
        return qk if self.qk_norm is None else self.qk_norm(qk), v


class FusedFeedForward(FeedForward):
    """SwiGLU with one projection for gate and up; w13 is (2*F, D)."""

    def __init__(self, *, w13: Linear, w2: RowLinear) -> None:
        nn.Module.__init__(self)
        self.w13 = w13
        self.w2 = w2  # type: ignore[assignment]

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return gate, up


class VocabEmbedding(nn.Module):
    """An embedding split over the ranks by vocabulary; ids of other ranks contribute zero."""

    def __init__(self, weight: Tensor, comm: Comm) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.weight: Tensor
        self.comm = comm
        self.first = comm.rank * weight.size(0)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.comm.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        foreign = (local < 0) | (local >= self.weight.size(0))
        rows = F.embedding(local.masked_fill_(foreign, 0), self.weight)
        return self.comm.all_reduce(rows.masked_fill_(foreign.unsqueeze(-1), 0))


class VocabLinear(nn.Module):
    """The output projection split over the ranks by vocabulary: full logits on the leader, local ones elsewhere."""

    def __init__(self, linear: Linear, comm: Comm, vocab_size: int) -> None:
        super().__init__()
        self.linear = linear
        self.comm = comm
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        local = self.linear(x)
        logits = self.comm.gather(local)
        return local if logits is None else logits[..., : self.vocab_size]
