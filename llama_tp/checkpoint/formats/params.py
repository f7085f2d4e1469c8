"""params.json, as Meta and as Mistral AI write it.

Mistral AI's keys: https://github.com/mistralai/mistral-inference, src/mistral_inference/args.py, and those that only
vLLM reads, vllm/transformers_utils/configs/mistral.py. A setting that changes what the model computes, and is not
supported here, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.huggingface_config import read_object
from llama_tp.config_error import ConfigError
from llama_tp.file_kind import shown
from llama_tp.model_args import ModelArgs

PARAMS = "params.json"

_MISTRALS_OWN = "hidden_dim"
"""Required by Mistral AI, unknown to Meta, whose rule gives this size."""
_READ = frozenset(
    {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta"}
    | {"sliding_window", "_sliding_window", "tied_embeddings"}
)
_WITHOUT_EFFECT = frozenset({"max_batch_size", "max_seq_len", "max_position_embeddings", "dtype"})
_ONLY: Mapping[str, Any] = {"model_type": "transformer", "activation": "silu", "causal": True}
"""Keys with the one value that is supported, their default."""
_THETA, _THETA_WITH_WINDOW = 1e6, 1e4
"""Without rope_theta: those of the models that were published without it."""
_MAX_SEQ_LEN = 2048
"""Default, as for other formats."""
_THEIR_NAMES = {"ffn_hidden_dim": "hidden_dim", "attention_head_dim": "head_dim", "context_limit": "sliding_window"}


def read_params(path: Path) -> ModelArgs:
    """The architecture; its `vocab_size` may be -1. ValueError, in one line, names the file, the key and the value."""
    if not path.is_file() or _MISTRALS_OWN not in (params := read_object(path)):
        return ModelArgs.load(path)  # which says what is there instead of a file
    try:
        return _mistral(params)
    except ConfigError as error:
        problem = re.sub(r"\b(\w+)(?==)", lambda name: _THEIR_NAMES.get(name[1], name[1]), error.problems[0])
        raise ValueError(f"{path}: {problem}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _mistral(params: Mapping[str, Any]) -> ModelArgs:
    _refuse_unsupported(params)
    window = _window(params)
    theta = _THETA if window is None else _THETA_WITH_WINDOW
    values = {name: params[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps") if name in params}
    args = ModelArgs.from_params(
        {
            **values,
            "vocab_size": params.get("vocab_size", -1),
            "ffn_hidden_dim": params["hidden_dim"],
            "attention_head_dim": params.get("head_dim"),
            "rope_theta": theta if params.get("rope_theta") is None else params["rope_theta"],
            "tied_embeddings": params.get("tied_embeddings"),
            "context_limit": window,
            "max_seq_len": min(_MAX_SEQ_LEN, window or _MAX_SEQ_LEN),
        }
    )
    if args.head_dim * args.n_heads != args.dim:
        return args
    return ModelArgs.from_params({**args.to_dict(), "attention_head_dim": None})


def _refuse_unsupported(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key in _READ or key in _WITHOUT_EFFECT or value is None or value is False:
            continue
        if key not in _ONLY:
            raise ValueError(
                f"{shown(key)}={shown(repr(value))} is not supported: only dense text models of Mistral AI are read"
            )
        if value != _ONLY[key]:
            raise ValueError(f"{shown(key)}={shown(repr(value))} is not supported, only {_ONLY[key]!r}")


def _window(params: Mapping[str, Any]) -> int | None:
    """The sliding window in tokens: of all layers, or a list of one for each in turn. None if no layer has one."""
    found = params.get("sliding_window")
    if found is None:
        found = params.get("_sliding_window")
    windows = found if isinstance(found, list) else [found]
    sizes = [size for size in windows if size is not None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"sliding_window={shown(repr(found))} must be a positive integer, null, or a list of them")
    return min(sizes, default=None)
