"""config.json of a Hugging Face model, read as transformers does for the supported architectures.

transformers 5 writes `rope_parameters` where 4 wrote `rope_scaling` and `rope_theta`; both are read. A setting that
changes what the model computes, and is not supported here, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.quantization_config import QuantizationConfig, read_quantization
from llama_tp.config_error import ConfigError
from llama_tp.file_kind import read_small, shown, why_no_content
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.text.siblings import parse_json

ARCHITECTURES: Mapping[str, Mapping[str, str | bool]] = {
    "LlamaForCausalLM": {"qkv_bias": "attention_bias", "wo_bias": "attention_bias", "ffn_bias": "mlp_bias"},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qkv_bias": "attention_bias", "wo_bias": "attention_bias", "qk_norm": True},
}
"""Supported architecture -> its features in ModelArgs: always on, or on if this key of config.json is true."""

_MAX_SEQ_LEN = 2048
"""Default, as for other formats; config.json gives the longest context possible, not the one to serve."""
_QWEN3_HEAD_DIM = 128
_QWEN_MAX_WINDOW_LAYERS = 28
_THEIR_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "attention_head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}


def read_config(path: Path) -> tuple[str, ModelArgs, QuantizationConfig | None]:
    """The architecture, its arguments, and how its linear layers are quantized, if they are. ValueError, in one line,
    names the file, the key and the value."""
    config = read_object(path)
    try:
        architecture = _architecture(config)
        return architecture, _model_args(architecture, config), read_quantization(config)
    except ConfigError as error:
        raise ValueError(f"{path}: {_in_their_names(error.problems[0])}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of reasonable size. ValueError says what is there instead."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; download it again")
    data = read_small(path)
    if problem := why_no_content(data):
        raise ValueError(f"{path} {problem}")
    return parse_json(path, data)


def _architecture(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architectures={shown(repr(found))} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return name


def _model_args(architecture: str, config: Mapping[str, Any]) -> ModelArgs:
    _refuse_unsupported(config)
    dim, n_heads = _need_int(config, "hidden_size"), _need_int(config, "num_attention_heads")
    head_dim = _int(config, "head_dim", _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else None)
    theta, scaling, longest = _rope(config)
    limits = [limit for limit in (longest, _window(architecture, config)) if limit is not None]
    return ModelArgs(
        dim=dim,
        n_layers=_need_int(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_int(config, "num_key_value_heads", n_heads) or n_heads,
        vocab_size=_need_int(config, "vocab_size"),
        ffn_hidden_dim=_need_int(config, "intermediate_size"),
        attention_head_dim=None if head_dim is None or head_dim * n_heads == dim else head_dim,
        norm_eps=_number(config, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=_bool(config, "tie_word_embeddings"),
        context_limit=min(limits, default=None),
        max_seq_len=min([_MAX_SEQ_LEN, *limits]),
        **{
            feature: key if isinstance(key, bool) else _bool(config, key)
            for feature, key in ARCHITECTURES[architecture].items()
        },
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={shown(repr(activation))} is not supported, only 'silu'")


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None, int | None]:
    """(theta, scaling, maximum tokens for which they hold). If both versions' keys are present, the older one's apply,
    as in transformers."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{key}={shown(repr(rope))} is not supported, only one rotation for all layers")
    theta = _number({"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}, "rope_theta")
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise ValueError(f"partial_rotary_factor={shown(repr(part))} is not supported, only 1: whole heads are rotated")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_number(rope, "factor")), None
    if kind == "llama3":
        return theta, _llama3(rope, config), None
    if kind == "dynamic":  # has an effect only beyond the training context
        return theta, None, _need_int(config, "max_position_embeddings")
    raise ValueError(
        f"{key} with rope_type={shown(repr(kind))} is not supported; supported: default, linear, llama3, dynamic"
    )


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    key = "original_max_position_embeddings"
    return RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_seq_len=_int(rope, key, None) or _need_int(config, "max_position_embeddings"),
    )


def _window(architecture: str, config: Mapping[str, Any]) -> int | None:
    """The sliding window in tokens; None if no layer has one."""
    if architecture == "LlamaForCausalLM":
        return None
    window = _int(config, "sliding_window", None)
    if architecture == "MistralForCausalLM":
        return window
    first = _int(config, "max_window_layers", _QWEN_MAX_WINDOW_LAYERS)
    assert first is not None
    is_windowed = first < _need_int(config, "num_hidden_layers")
    if (layer_types := config.get("layer_types")) is not None:
        kinds = set(map(str, layer_types if isinstance(layer_types, list) else [layer_types]))
        if odd := kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types with {shown(repr(min(odd)))} is not supported, only full_attention, sliding_attention"
            )
        is_windowed = "sliding_attention" in kinds
    return window if is_windowed and _bool(config, "use_sliding_window") else None


def _need_int(config: Mapping[str, Any], key: str) -> int:
    if (value := _int(config, key, None)) is None:
        raise ValueError(f"key {key!r} is missing")
    return value


def _int(config: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key}={shown(repr(value))} must be an integer of at least 0")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    if (value := config.get(key)) is None:
        raise ValueError(f"key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key}={shown(repr(value))} must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key}={shown(value)} is out of range") from None


def _bool(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key}={shown(repr(value))} must be true or false")
    return bool(value)


def _in_their_names(problem: str) -> str:
    """A problem of ModelArgs, in config.json's names."""
    return re.sub(r"\b(\w+)(?==)", lambda name: _THEIR_NAMES.get(name[1], name[1]), problem)
