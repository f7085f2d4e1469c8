"""Small random Llamas, and the same weights as a transformers model: the oracle for logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama_tp.bench.peers import transformers_model
from llama_tp.config import EngineConfig
from llama_tp.engine.compilation import use_kernels
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.model.attention import AttentionBackend
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import STORED
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import Comm, SingleComm

SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)

MODELS = {
    "mha": ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=131, multiple_of=16),
    "gqa": ModelArgs(dim=96, n_layers=2, n_heads=12, n_kv_heads=4, vocab_size=128, multiple_of=32),
    "rope scaling": ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=96,
        multiple_of=8,
        rope_theta=5000.0,
        rope_scaling=SCALING,
    ),
    "tied": ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=99, multiple_of=64, tied_embeddings=True),
    "multiplier": ModelArgs(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32, ffn_dim_multiplier=1.3
    ),
}


VARIANTS = {
    "attention bias": ModelArgs(
        dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, ffn_hidden_dim=96, qkv_bias=True
    ),
    "biases everywhere": ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        vocab_size=99,
        multiple_of=16,
        qkv_bias=True,
        wo_bias=True,
        ffn_bias=True,
    ),
    "head norms, wide heads": ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=16, attention_head_dim=32, qk_norm=True
    ),
    "linear rope scaling, narrow heads": ModelArgs(
        dim=96,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=128,
        multiple_of=32,
        attention_head_dim=6,
        rope_scaling=RopeScaling(kind="linear", factor=2.5),
        tied_embeddings=True,
    ),
}
"""What Meta's own models do not have, and others of their kind do."""


UNEVEN = {
    f"{heads} heads, {kv_heads} kv": ModelArgs(
        dim=heads * 8, n_layers=2, n_heads=heads, n_kv_heads=kv_heads, vocab_size=101, multiple_of=40
    )
    for heads, kv_heads in ((8, 4), (9, 3), (6, 6), (8, 1))
}
"""Heads, hidden dims and a vocabulary that few numbers of ranks divide."""


def random_model(args: ModelArgs, seed: int = 0) -> Transformer:
    """Weights large enough that attention and logits are far from uniform."""
    torch.manual_seed(seed)
    model = Transformer(args)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            elif not (args.tied_embeddings and name == "output.weight"):
                weight.normal_(std=0.12 if "embeddings" not in name else 1.0)
    return model.requires_grad_(False).eval()


def runner_of(
    model: Transformer,
    config: EngineConfig,
    *,
    dtype: torch.dtype = torch.float32,
    make_backend: Callable[[KVCache], AttentionBackend] | None = None,
) -> ModelRunner:
    """A single rank's runner of local modules around a copy of the model's weights."""
    twin = Transformer(model.args).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return ModelRunner(
        localize(twin.to(dtype), SingleComm()),
        config,
        num_kv_heads=model.args.n_kv_heads,
        dtype=dtype,
        device=torch.device("cpu"),
        make_backend=make_backend,
    )


def engine_of(
    model: Transformer, *, make_backend: Callable[[KVCache], AttentionBackend] | None = None, **config: object
) -> Engine:
    """A single-rank engine around a copy of the model's weights; `config` are fields of EngineConfig."""
    engine_config = EngineConfig(**{"max_seq_len": 128, "max_batch_size": 4, **config})  # type: ignore[arg-type]
    return Engine(runner_of(model, engine_config, make_backend=make_backend), SingleComm(), engine_config)


def transformers_twin(model: Transformer) -> Any:
    """The same model as transformers computes it."""
    return transformers_model(model.args, model.state_dict(), torch.float32)


def compiled_runner_of(
    model: Transformer,
    config: EngineConfig,
    *,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 2,
    chosen: Kernels | None = None,
    comm: Comm | None = None,
) -> ModelRunner:
    """As `runner_of`, with steps of few tokens computed by the compiled kernels."""
    twin = Transformer(model.args).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    runner = ModelRunner(
        local := localize(twin.to(dtype), comm or SingleComm(), layout=STORED),
        config,
        num_kv_heads=model.args.n_kv_heads,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    use_kernels(runner, local, chosen or kernels(num_threads), config)
    return runner


@cache
def library_path() -> Path:
    """Of the compiled kernels."""
    path = build_kernels().wait()
    assert path is not None, build_kernels().error
    return path


@cache
def kernels(num_threads: int = 2) -> Kernels:
    return Kernels(library_path(), num_threads)
