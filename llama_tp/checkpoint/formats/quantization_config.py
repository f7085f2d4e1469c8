"""quantization_config of a Hugging Face model's config.json.

Read as transformers' GPTQConfig and AwqConfig do. What would change the weights, and is not supported, is refused by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_tp.model.weights import GROUP

_ORIGINAL = "use the model's original weights, which can be quantized while they are converted"
_READ = "quant_method gptq or awq with bits=4"


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How the quantized linear layers of a checkpoint are stored."""

    method: Literal["gptq", "awq"]
    group_size: int | None
    """Columns that share a scale; None: all of a row."""
    zeros_less_one: bool
    """Whether zeros are stored less one, as by the first version of GPTQ's format."""


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """From the contents of config.json; None if the model is not quantized. ValueError names the key and value."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config={quantization!r} must be an object; download config.json again")
    method = quantization.get("quant_method")
    if method not in ("gptq", "awq"):
        raise ValueError(f"quantization_config has quant_method={method!r}, supported is {_READ}; {_ORIGINAL}")
    _expect(quantization, "bits", 4, default=None)
    _expect(quantization, "pack_dtype", "int32", default="int32")
    if quantization.get("dynamic"):
        raise ValueError(f"quantization_config has dynamic, which gives layers settings of their own; {_ORIGINAL}")
    return QuantizationConfig(
        method,
        _group_size(quantization),
        _zeros_less_one(quantization) if method == "gptq" else _check_awq(quantization),
    )


def _expect(quantization: Mapping[str, Any], key: str, *supported: object, default: object) -> Any:
    """The value of a key, in lower case if it is a string. ValueError if it is not one of those supported."""
    value = default if (found := quantization.get(key)) is None else found
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, bool) != isinstance(supported[0], bool) or value not in supported:
        listed = " or ".join(map(repr, supported))
        raise ValueError(f"quantization_config has {key}={found!r}, supported is {listed}; {_ORIGINAL}")
    return value


def _group_size(quantization: Mapping[str, Any]) -> int | None:
    size = quantization.get("group_size", 128)
    if size == -1:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % GROUP:
        raise ValueError(
            f"quantization_config has group_size={size!r}, supported are multiples of {GROUP}, and -1; {_ORIGINAL}"
        )
    return size


def _zeros_less_one(quantization: Mapping[str, Any]) -> bool:
    if quantization.get("is_marlin_format"):
        raise ValueError(f"quantization_config has is_marlin_format=true, a layout for one GPU kernel; {_ORIGINAL}")
    key = "format" if quantization.get("checkpoint_format") is None else "checkpoint_format"
    return bool(_expect(quantization, key, "gptq", "gptq_v2", default="gptq") == "gptq")


def _check_awq(quantization: Mapping[str, Any]) -> bool:
    key = "format" if quantization.get("version") is None else "version"
    _expect(quantization, key, "gemm", default="gemm")
    _expect(quantization, "zero_point", True, default=True)
    if quantization.get("backend") == "llm-awq":
        raise ValueError(
            f"quantization_config has backend='llm-awq', which stores weights in another order; {_ORIGINAL}"
        )
    return False
