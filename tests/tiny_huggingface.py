"""Tiny random models as transformers makes and saves them: the originals, and the oracle, of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

WINDOW = 72
_SIZES = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
"""Rows that groups of quantized weights divide."""
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _of(config: type, **changes: Any) -> Callable[[], Any]:
    return lambda: config(**{**_SIZES, **changes})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _of(LlamaConfig),
    "llama, grouped": _of(LlamaConfig, num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama, tied": _of(LlamaConfig, tie_word_embeddings=True),
    "llama, biases": _of(LlamaConfig, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama, wide heads": _of(LlamaConfig, num_key_value_heads=2, head_dim=24),
    "llama, groups": _of(LlamaConfig, num_key_value_heads=2, head_dim=32, intermediate_size=160),
    "llama, groups of 128": _of(LlamaConfig, **_WIDE),
    "llama, groups, tied": _of(LlamaConfig, **_WIDE, tie_word_embeddings=True),
    "llama, blocks of 256": _of(LlamaConfig, **{**_WIDE, "hidden_size": 256, "num_hidden_layers": 1}),
    "qwen2, groups": _of(Qwen2Config, **_WIDE, tie_word_embeddings=True),
    "qwen3, groups": _of(Qwen3Config, **_WIDE, head_dim=32),
    "llama 3.1": _of(LlamaConfig, num_key_value_heads=1, rope_parameters=_LLAMA3),
    "llama, linear": _of(LlamaConfig, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "llama, dynamic": _of(LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "mistral": _of(MistralConfig, num_key_value_heads=2, sliding_window=None),
    "mistral, window": _of(MistralConfig, num_key_value_heads=2, sliding_window=WINDOW),
    "qwen2": _of(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2, window": _of(Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _of(Qwen3Config, num_key_value_heads=2, head_dim=32),
    "qwen3, biases": _of(Qwen3Config, num_key_value_heads=2, head_dim=16, attention_bias=True),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    """In eval mode, with weights large enough that attention and logits are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for weight_name, weight in model.named_parameters():  # a tied one once
        if weight_name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=1.0 if "embed_tokens" in weight_name else 0.12)
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """As its publisher would. The folder."""
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
