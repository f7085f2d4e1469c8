"""llama_tp models with random weights, engines for them, and their roofline."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.device import CUDA, DEVICE, DTYPE
from gpu.report import Report
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.linear import DenseLinear, Linear
from llama_tp.model.norm import Norm
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import Comm, SingleComm
from llama_tp.parallel.local_modules import FusedAttention, FusedFeedForward, RowLinear, VocabEmbedding, VocabLinear
from llama_tp.parallel.sharding import local_kv_heads, local_shapes, num_parameters_of_rank

_MODELS: dict[str, dict[str, Any]] = {
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "vocab_size": 32000},
    "8b": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0,
    },
    "70b": {
        "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 32000, "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
    # for the smoke test
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 128, "multiple_of": 16},
    "tiny 70b": {"dim": 128, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 128, "multiple_of": 16},
    # real head dims, otherwise small
    "small mha": {"dim": 512, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 1000, "multiple_of": 64},
    "small gqa": {"dim": 1024, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 1000, "multiple_of": 64},
    "small 3to1": {"dim": 576, "n_layers": 4, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 1000, "multiple_of": 64},
}  # fmt: skip


def model_args(name: str) -> ModelArgs:
    return ModelArgs(**_MODELS[name])


class StubComm:
    """One rank of a nonexistent group: reductions return this rank's part."""

    rank, is_leader = 0, False

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> None:
        return None

    def publish(self, message: bytes | None) -> bytes:
        return message or b""

    def close(self) -> None:
        pass


def build_local_model(
    args: ModelArgs, comm: Comm | None = None, *, dtype: torch.dtype = DTYPE, device: torch.device = DEVICE
) -> Transformer:
    """One rank's model of local modules with random weights, created on the device: no checkpoint, no copy."""
    comm = comm or SingleComm()
    size, dim, d = comm.size, args.dim, args.head_dim
    shapes = local_shapes(args, size, comm.rank)
    heads, kv_heads = shapes["layers.0.attention.wq.weight"][0] // d, local_kv_heads(args, size, comm.rank)
    hidden, vocab = shapes["layers.0.feed_forward.w1.weight"][0], shapes["tok_embeddings.weight"][0]

    def weight(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(0, std)

    def norm() -> Any:
        return Norm(torch.empty(dim, device=device, dtype=dtype).uniform_(0.8, 1.2), args.norm_eps)

    with torch.device("meta"):
        model = Transformer(args).to(dtype).requires_grad_(False).eval()
    for block in model.layers:
        attention = FusedAttention(
            wqkv=DenseLinear(weight((heads + 2 * kv_heads) * d, dim)),
            wo=RowLinear(DenseLinear(weight(dim, heads * d)), comm),
            num_kv_heads=kv_heads,
            head_dim=d,
        )
        feed_forward = FusedFeedForward(
            w13=DenseLinear(weight(2 * hidden, dim)), w2=RowLinear(DenseLinear(weight(dim, hidden)), comm)
        )
        _set(block, attention=attention, feed_forward=feed_forward, attention_norm=norm(), ffn_norm=norm())
    embedding = VocabEmbedding(weight(vocab, dim, std=1.0), comm)
    output = VocabLinear(DenseLinear(weight(vocab, dim)), comm, args.vocab_size)
    _set(model, norm=norm(), tok_embeddings=embedding, output=output)
    return model


def _set(owner: torch.nn.Module, **modules: torch.nn.Module) -> None:
    for name, module in modules.items():
        setattr(owner, name, module)


def copy_of(reference: Transformer, args: ModelArgs, dtype: torch.dtype) -> Transformer:
    """A model of local modules on the device, with the weights of a float32 model on the CPU."""
    model = build_local_model(args, dtype=dtype)
    for name, theirs in reference.named_modules():
        if isinstance(theirs, Linear):
            _replace(model, name, DenseLinear(theirs.dense_weight().to(DEVICE, dtype)))
        elif isinstance(theirs, VocabEmbedding):
            model.get_submodule(name).weight = theirs.weight.to(DEVICE, dtype)
        elif isinstance(theirs, Norm):
            _replace(model, name, Norm(theirs.weight.to(DEVICE, dtype), theirs.eps))
    return model


def _replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    _set(model.get_submodule(owner), **{attribute: module})


def make_engine(
    model: Transformer, kv_heads: int, *, device: torch.device = DEVICE, dtype: torch.dtype = DTYPE, **config: Any
) -> Engine:
    engine_config = EngineConfig(**{"prefix_cache": False, **config})
    runner = ModelRunner(model, engine_config, num_kv_heads=kv_heads, dtype=dtype, device=device)
    return Engine(runner, SingleComm(), engine_config)


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def greedy(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    completions = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=count))
    return [one.token_ids for one in completions]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> list[int]:
    """How many leading tokens of each sequence are equal."""
    return [sum(a == b for a, b in zip(*pair, strict=False)) for pair in zip(ours, theirs, strict=False)]


def write_random_checkpoint(folder: Path, args: ModelArgs, dtype: torch.dtype = DTYPE) -> int:
    """Write a converted checkpoint with random weights. Returns its bytes of weights."""
    generator = torch.Generator().manual_seed(0)

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        std = 1.0 if name == "tok_embeddings.weight" else 0.02
        return torch.empty(shape, dtype=dtype).normal_(0, std, generator=generator)

    weights = {name: random(name, shape) for name, shape in weight_shapes(args).items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = dcp.save(MemoryReader.of(args, weights), folder)
    args.save(folder / "model_args.json")
    write_manifest(folder, known=files, about={"source": "random"})
    return sum(weight.nbytes for weight in weights.values())


def weight_bytes(args: ModelArgs, size: int = 1) -> int:
    """Bytes of weights read by a decode step: all but the embedding."""
    return 2 * (num_parameters_of_rank(args, size, 0) - -(-args.vocab_size // size) * args.dim)


def kv_bytes(args: ModelArgs, size: int = 1) -> int:
    """Bytes read by a decode step per token of context."""
    return 2 * 2 * args.n_layers * local_kv_heads(args, size, 0) * args.head_dim


def with_roofline(report: Report, found: dict[str, Any], args: ModelArgs, size: int = 1) -> dict[str, Any]:
    """A result with its share of the roofline: weights, keys and values over the bandwidth measured by section
    ceilings."""
    bandwidth = report.get("ceilings", "read_best_gb_s", 3000.0 if CUDA else 10.0)
    num_bytes = weight_bytes(args, size) + found["batch"] * found["context"] * kv_bytes(args, size)
    floor_ms = num_bytes / bandwidth / 1e6
    ms = found["ms"]["step"] if isinstance(found["ms"], dict) else found["ms"]
    return {"floor_ms": round(floor_ms, 3), "of_roofline": round(floor_ms / ms, 3), **found}
