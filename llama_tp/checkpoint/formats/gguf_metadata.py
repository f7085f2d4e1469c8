"""The metadata of a GGUF file, and the architecture that it gives.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever would change what the model computes, and is
not computed here, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.config_error import ConfigError
from llama_tp.model.rope import scale_frequencies
from llama_tp.model_args import ModelArgs, RopeScaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What is read. Mistral's models are "llama" here."""

_MAX_SEQ_LEN = 2048
"""By default, as of other formats."""
_PUBLISHED_SCALINGS = (RopeScaling(factor=8.0), RopeScaling(factor=32.0))
"""Of Llama 3.1 and 3.3, and of Llama 3.2: their config.json says so on the hub."""
_THEIR_NAMES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "ffn_hidden_dim": "feed_forward_length",
    "attention_head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "context_limit": "attention.sliding_window",
    "rope_scaling.factor": "rope.scaling.factor",
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed values by their keys. ValueError names the file, the key and the value."""

    path: Path
    values: Mapping[str, Any]
    """From a key to the gguf package's field."""

    def get(self, key: str, default: Any = None) -> Any:
        field = self.values.get(key)
        return default if field is None else field.contents()

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._need(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{self.path}: {key}={_shown(value)} must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._need(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.path}: {key}={_shown(value)} must be a number")
        return _shortest(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {key}={_shown(value)} must be true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._need(key, None)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{self.path}: {key}={_shown(value)} must be a list of strings")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self._need(key, None)
        if not isinstance(value, list) or not all(isinstance(number, (int, float)) for number in value):
            raise ValueError(f"{self.path}: {key}={_shown(value)} must be a list of numbers")
        return value

    def _need(self, key: str, default: Any) -> Any:
        if (value := self.get(key, default)) is None:
            raise ValueError(f"{self.path}: metadata {key} is missing")
        return value


def architecture_of(metadata: Metadata) -> str:
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{metadata.path} holds a model of architecture {_shown(name)}, which is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return str(name)


def read_args(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_freqs: Tensor | None) -> ModelArgs:
    """The arguments of the architecture. ValueError, in one line, names the file, the key and the value.

    shapes: of the tensors that the file holds, by Meta's names
    rope_freqs: what the wavelengths of a head are multiplied by, where the file says so
    """
    architecture = architecture_of(metadata)
    try:
        return _model_args(architecture, metadata, shapes, rope_freqs)
    except ConfigError as error:
        problem = re.sub(
            r"\b([\w.]+)(?==)",
            lambda name: f"{architecture}.{_THEIR_NAMES[name[1]]}" if name[1] in _THEIR_NAMES else name[1],
            error.problems[0],
        )
        raise ValueError(f"{metadata.path}: {problem}") from None


def _model_args(
    architecture: str, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_freqs: Tensor | None
) -> ModelArgs:
    def key(name: str) -> str:
        return f"{architecture}.{name}"

    if experts := metadata.integer(key("expert_count"), 0):
        raise ValueError(f"{metadata.path}: {key('expert_count')}={experts}: a mixture of experts is not supported")
    dim, n_heads = metadata.integer(key("embedding_length")), metadata.integer(key("attention.head_count"))
    head_dim = metadata.integer(key("attention.key_length"), dim // max(n_heads, 1))
    for name in ("rope.dimension_count", "attention.value_length"):
        if (size := metadata.integer(key(name), head_dim)) != head_dim:
            raise ValueError(f"{metadata.path}: {key(name)}={size}, expected the head size {head_dim}")
    if not (rows := shapes.get("tok_embeddings.weight", ())):
        raise ValueError(f"{metadata.path}: tensor token_embd.weight is missing")
    theta = metadata.number(key("rope.freq_base"), 10000.0)
    window = metadata.integer(key("attention.sliding_window"), 0) or None
    args = ModelArgs(
        dim=dim,
        n_layers=metadata.integer(key("block_count")),
        n_heads=n_heads,
        n_kv_heads=metadata.integer(key("attention.head_count_kv"), n_heads),
        vocab_size=rows[0],
        attention_head_dim=None if head_dim == dim // max(n_heads, 1) else head_dim,
        norm_eps=metadata.number(key("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_scaling(architecture, metadata, rope_freqs, theta, head_dim),
        tied_embeddings="output.weight" not in shapes,
        qkv_bias=architecture == "qwen2" or "layers.0.attention.wq.bias" in shapes,
        wo_bias="layers.0.attention.wo.bias" in shapes,
        ffn_bias="layers.0.feed_forward.w2.bias" in shapes,
        qk_norm=architecture == "qwen3",
        context_limit=window,
        max_seq_len=min(_MAX_SEQ_LEN, window or _MAX_SEQ_LEN),
        ffn_hidden_dim=metadata.integer(key("feed_forward_length")),
    )
    return _by_metas_rule(args)


def _by_metas_rule(args: ModelArgs) -> ModelArgs:
    """The same arguments, without a hidden size where Meta's rule gives it."""
    ruled = replace(args, ffn_hidden_dim=None)
    return ruled if ruled.hidden_dim == args.hidden_dim else args


def _scaling(
    architecture: str, metadata: Metadata, rope_freqs: Tensor | None, theta: float, head_dim: int
) -> RopeScaling | None:
    """As llama.cpp reads it: linear if nothing is said, and by a factor of 1 if none is given."""
    key = f"{architecture}.rope.scaling.type"
    if (kind := metadata.get(key, "linear")) not in ("none", "linear"):
        raise ValueError(f"{metadata.path}: {key}={_shown(kind)} is not supported; supported: none, linear")
    factor = metadata.number(
        f"{architecture}.rope.scaling.factor", metadata.number(f"{architecture}.rope.scale_linear", 1.0)
    )
    linear = RopeScaling(kind="linear", factor=factor) if kind == "linear" and factor not in (0, 1) else None
    if rope_freqs is None:
        return linear
    if linear is not None:
        raise ValueError(f"{metadata.path}: {key}='linear' together with rope_freqs.weight is not supported")
    return _published_scaling(metadata.path, rope_freqs, theta, head_dim)


def _published_scaling(path: Path, factors: Tensor, theta: float, head_dim: int) -> RopeScaling | None:
    """The settings that llama.cpp's converter made the factors from, which it leaves out."""
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factors.shape == freqs.shape:
        if torch.all(factors == 1):
            return None
        for scaling in _PUBLISHED_SCALINGS:
            if torch.allclose(freqs / scale_frequencies(freqs, scaling), factors.float(), rtol=1e-4, atol=0):
                return scaling
    published = ", ".join(f"{scaling.factor:g}" for scaling in _PUBLISHED_SCALINGS)
    raise ValueError(
        f"{path}: tensor rope_freqs.weight is not that of Llama 3.1, 3.2 or 3.3 (rope scaling by a factor of "
        f"{published}; 1, 4 and 8192): not supported"
    )


def _shown(value: object) -> str:
    """A value, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(f"{value:.7g}")
