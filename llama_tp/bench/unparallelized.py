"""The model as it was defined, never parallelized: what its form for serving on one rank is compared with."""

from __future__ import annotations

import torch

from llama_tp.bench.peers import dense_weights
from llama_tp.bench.subject import Subject
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.model.transformer import Transformer
from llama_tp.parallel.comm import SingleComm


def unparallelized_engine(subject: Subject, engine: Engine) -> Engine:
    """An engine like the given one, with the same weights, around a plain `Transformer`. ValueError if they are
    quantized."""
    runner = engine.runner
    with torch.device("meta"):
        model = Transformer(subject.args).requires_grad_(False)
    weights = dense_weights(subject.args, subject.checkpoint)
    held = {name: one.to(runner.device, runner.dtype) for name, one in weights.items()}
    if subject.args.tied_embeddings:
        held["output.weight"] = held["tok_embeddings.weight"]
    model.load_state_dict(held, assign=True)
    model.tie_embeddings()
    plain = ModelRunner(
        model, runner.config, num_kv_heads=subject.args.n_kv_heads, dtype=runner.dtype, device=runner.device
    )
    return Engine(plain, SingleComm(), runner.config)
