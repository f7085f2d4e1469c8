"""Tensor-parallel Llama in plain PyTorch.

    import llama_tp

    group = llama_tp.join()
    args = llama_tp.ModelArgs.load("converted_checkpoints/model_args.json")
    engine = llama_tp.load_engine("converted_checkpoints", args, llama_tp.EngineConfig(), group)
    engine.generate([[1, 15043]], llama_tp.SamplingParams(max_new_tokens=8, temperature=0))

The same code runs on every rank under torchrun, where scripts should end with `llama_tp.exit_rank()`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ConfigError": "llama_tp.config_error",
    "EngineConfig": "llama_tp.config",
    "ModelArgs": "llama_tp.model_args",
    "Completion": "llama_tp.engine.engine",
    "Engine": "llama_tp.engine.engine",
    "EngineLoop": "llama_tp.engine.loop",
    "SamplingParams": "llama_tp.engine.sampling_params",
    "chat_format": "llama_tp.text.chat",
    "convert": "llama_tp.checkpoint.convert",
    "join": "llama_tp.parallel.launch",
    "exit_rank": "llama_tp.parallel.launch",
    "load_engine": "llama_tp.engine.startup",
    "load_tokenizer": "llama_tp.text.tokenizer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import on first use, so that `llama-tp --help` does not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llama_tp' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
