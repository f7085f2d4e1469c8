"""Llama as Meta defines it (https://github.com/meta-llama/llama, llama/model.py), parameter names included.

The model does not know that it is parallel: the number of local heads comes from the tensors, and the two points
of a layer where ranks communicate (`wo`, `w2`) are modules that a sharding plan may replace. State is passed in.

Unlike Meta's, the residual stream is float32 for any dtype of the weights: 60 roundings to bfloat16 are enough to flip
a greedy token of a small model, and ranks that add up partial sums would flip others than a single rank.

Legend: T tokens, D model dim, H heads, K kv heads, d head dim, F hidden dim of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_tp.model.batch import Batch, Output
from llama_tp.model.kv_cache import KVCache, LayerCache
from llama_tp.model.rope import apply_rope
from llama_tp.model_args import ModelArgs


class _Linear(nn.Linear):
    """Without initial weights: a checkpoint has them, and to compute others takes 0.4 s even on the meta device."""

    def reset_parameters(self) -> None:
        pass


class _Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None:
        pass


class Transformer(nn.Module):
    """Token ids in, logits of the sampled tokens out."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = _Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = _Linear(args.dim, args.vocab_size, bias=False)
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """If the model ties them, make the output projection the embedding matrix. Idempotent."""
        if self.args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, batch: Batch, cache: KVCache) -> Output:
        """Also writes the batch's keys and values to the cache."""
        x = self.tok_embeddings(batch.tokens).float()  # (T, D), the residual stream
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, batch, layer_cache)
        is_finite = x.isfinite().all(dim=-1)
        if batch.sampled.numel() == 0:
            return Output(None, is_finite)
        return Output(self.output(self.norm(x[batch.sampled])).float(), is_finite)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        # A NaN in the cache would reach every reader of its slot, even under a mask: 0 * NaN is NaN.
        x = x + self.attention(self.attention_norm(x).nan_to_num_(0.0, 0.0, 0.0), batch, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv:2305.13245, arXiv:2104.09864).

    In some models each head's query and key are normalised before they are rotated (arXiv:2010.04245).
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = _Linear(args.dim, args.n_heads * args.head_dim, bias=args.qkv_bias)
        self.wk = _Linear(args.dim, args.n_kv_heads * args.head_dim, bias=args.qkv_bias)
        self.wv = _Linear(args.dim, args.n_kv_heads * args.head_dim, bias=args.qkv_bias)
        self.wo = _Linear(args.n_heads * args.head_dim, args.dim, bias=args.wo_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        qk, v = self.project(x)  # (T, H + K, d), (T, K, d)
        qk = apply_rope(qk, batch.rope)
        q, k = qk.split((qk.size(1) - v.size(1), v.size(1)), dim=1)
        return self.wo(batch.attention(q, k, v, cache).flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, concatenated for one rotation: (T, H + K, d); values (T, K, d)."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), v


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = _Linear(args.dim, args.hidden_dim, bias=args.ffn_bias)
        self.w2 = _Linear(args.hidden_dim, args.dim, bias=args.ffn_bias)
        self.w3 = _Linear(args.dim, args.hidden_dim, bias=args.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.w2(F.silu(gate) * up)

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both (T, F)."""
        return self.w1(x), self.w3(x)


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (arXiv:1910.07467), computed in float32, returned in the model's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)
