"""The architectures of published models by name, for planning and for benchmarks with random weights.

Sources: Meta's params.json and the models' config.json on the Hugging Face hub. `max_seq_len` is the context that a
plan assumes by default: that of the training, or 8,192 tokens if that is longer.
"""

from __future__ import annotations

import difflib

from llama_tp.model_args import ModelArgs, RopeScaling


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden: int) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=32000,
        ffn_hidden_dim=hidden,
        max_seq_len=4096,
    )


def _llama3(
    dim: int, n_layers: int, n_heads: int, hidden: int, rope_factor: float, *, tied_embeddings: bool = False
) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_hidden_dim=hidden,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(factor=rope_factor),
        tied_embeddings=tied_embeddings,
        max_seq_len=8192,
    )


def _qwen(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden: int,
    vocab_size: int,
    *,
    tied_embeddings: bool = False,
    is_qwen3: bool = False,
) -> ModelArgs:
    """Qwen2.5 has biases on queries, keys and values; Qwen3 norms its heads, which all have 128 elements."""
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        ffn_hidden_dim=hidden,
        attention_head_dim=128 if is_qwen3 else None,
        qkv_bias=not is_qwen3,
        qk_norm=is_qwen3,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        tied_embeddings=tied_embeddings,
        max_seq_len=8192,
    )


PUBLISHED: dict[str, ModelArgs] = {
    "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, 8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, 8.0),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, 8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied_embeddings=True),
    "llama3.3-70b": _llama3(8192, 80, 64, 28672, 8.0),
    "tinyllama-1.1b": ModelArgs(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, ffn_hidden_dim=5632, max_seq_len=2048
    ),
    "smollm2-135m": ModelArgs(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        vocab_size=49152,
        ffn_hidden_dim=1536,
        rope_theta=100000.0,
        tied_embeddings=True,
        max_seq_len=8192,
    ),
    "mistral-7b": ModelArgs(  # v0.3
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=32768,
        ffn_hidden_dim=14336,
        rope_theta=1000000.0,
        max_seq_len=8192,
    ),
    "qwen2.5-0.5b": _qwen(896, 24, 14, 2, 4864, 151936, tied_embeddings=True),
    "qwen2.5-1.5b": _qwen(1536, 28, 12, 2, 8960, 151936, tied_embeddings=True),
    "qwen2.5-3b": _qwen(2048, 36, 16, 2, 11008, 151936, tied_embeddings=True),
    "qwen2.5-7b": _qwen(3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-14b": _qwen(5120, 48, 40, 8, 13824, 152064),
    "qwen2.5-32b": _qwen(5120, 64, 40, 8, 27648, 152064),
    "qwen2.5-72b": _qwen(8192, 80, 64, 8, 29568, 152064),
    "qwen3-8b": _qwen(4096, 36, 32, 8, 12288, 151936, is_qwen3=True),
    "qwen3-32b": _qwen(5120, 64, 64, 8, 25600, 151936, is_qwen3=True),
}
"""Name -> architecture."""


def published(name: str) -> ModelArgs:
    """The architecture of a published model. ValueError lists the names that are known."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    close = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"model={name!r} is not a published model; {hint}known: {', '.join(PUBLISHED)}")
