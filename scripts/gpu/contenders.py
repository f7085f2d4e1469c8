"""Other engines on the same GPU, in child processes: gpt-fast's compiled decode, and transformers' generate."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.child import emit, run_child
from gpu.device import CUDA, DEVICE, DTYPE, SMOKE, sync
from gpu.report import Report


def gptfast(r: Report, options: list[str], directory: str | None, layers: int) -> None:
    """gpt-fast itself if its repository is given, else an equivalent model. 7B's layers, random weights.

    Fewer layers compile faster; compare GB/s, which hardly depend on the number of layers.
    """
    run_child(
        r, "gptfast", [*options, "--gpt-fast-layers", str(layers), *(["--gpt-fast", directory] if directory else [])]
    )


def child_gptfast(directory: str | None, layers: int) -> None:
    model, decode_one = _gptfast(directory, layers) if directory else _gptfast_alike(layers)
    model = model.to(DTYPE).to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    matmul_bytes = sum(p.nbytes for p in model.parameters()) - model.tok_embeddings.weight.nbytes
    with torch.device(DEVICE):
        model.setup_caches(max_batch_size=1, max_seq_length=640 if CUDA else 64)
    if CUDA:
        from torch._inductor import config

        config.coordinate_descent_tuning = True
        decode_one = torch.compile(decode_one, mode="reduce-overhead", fullgraph=True)

    def loop(count: int, start: int) -> float:
        """Seconds per token."""
        token = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
        pos = torch.tensor([start], device=DEVICE, dtype=torch.int)
        sync()
        begin = time.perf_counter()
        for _ in range(count):
            with sdpa_kernel(SDPBackend.MATH):
                token, _ = decode_one(model, token.view(1, -1), pos, temperature=0.8, top_k=200 if CUDA else 5)
                token = token.clone()
            pos += 1
        sync()
        return (time.perf_counter() - begin) / count

    label = "gpt-fast" if directory else "gpt-fast alike"
    with torch.no_grad():
        begin = time.perf_counter()
        loop(3, 0)
        emit("compile", {"layers": layers, "s": round(time.perf_counter() - begin, 1)})
        for start in (4, 512) if CUDA else (4,):
            seconds = min(loop(100, start) for _ in range(3)) if CUDA else loop(3, start)
            rates = {"tok_s": round(1 / seconds, 1), "gb_s": round(matmul_bytes / seconds / 1e9, 1)}
            emit(f"{label} B=1 at {start}", {"ms": round(1e3 * seconds, 3), **rates})


def _gptfast(directory: str, layers: int) -> tuple[Any, Callable[..., tuple[Tensor, Tensor]]]:
    sys.path.insert(0, directory)
    import generate
    from model import ModelArgs, Transformer

    sizes = (
        {"n_layer": 2, "n_head": 4, "dim": 64, "vocab_size": 128}
        if SMOKE
        else {"n_layer": layers, "n_head": 32, "dim": 4096}
    )
    with torch.device("meta"):
        return Transformer(ModelArgs(block_size=2048, **sizes)), generate.decode_one_token


def _gptfast_alike(num_layers: int) -> tuple[Any, Callable[..., tuple[Tensor, Tensor]]]:
    """What gpt-fast compiles: a static cache over the whole length under a mask, bf16 residual stream, fused QKV."""
    dim, layers, heads, hidden, vocab = (4096, num_layers, 32, 11008, 32000) if CUDA else (64, 2, 4, 96, 128)
    d = dim // heads

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)).type_as(x) * self.weight

    class Block(nn.Module):
        k: Tensor
        v: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
            self.w2 = nn.Linear(hidden, dim, bias=False)
            self.one, self.two = Norm(), Norm()

        def forward(self, x: Tensor, pos: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = (part.view(batch, length, heads, d) for part in self.wqkv(self.one(x)).split(dim, dim=-1))
            q, k, v = (part.transpose(1, 2) for part in (rotate(q, rope), rotate(k, rope), v))
            self.k[:, :, pos], self.v[:, :, pos] = k, v
            y = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)
            x = x + self.wo(y.transpose(1, 2).reshape(batch, length, dim))
            h = self.two(x)
            return x + self.w2(F.silu(self.w1(h)) * self.w3(h))

    def rotate(x: Tensor, rope: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        angles = rope.view(1, pairs.size(1), 1, pairs.size(3), 2)
        real = pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1]
        imaginary = pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1]
        return torch.stack([real, imaginary], -1).flatten(3).type_as(x)

    class Model(nn.Module):
        rope: Tensor
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings = nn.Embedding(vocab, dim)
            self.layers = nn.ModuleList(Block() for _ in range(layers))
            self.norm = Norm()
            self.output = nn.Linear(dim, vocab, bias=False)

        def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
            for layer in self.layers:
                layer.k = torch.zeros(max_batch_size, heads, max_seq_length, d, dtype=DTYPE)
                layer.v = torch.zeros(max_batch_size, heads, max_seq_length, d, dtype=DTYPE)
            angles = torch.outer(torch.arange(max_seq_length).float(), 1e4 ** -(torch.arange(0, d, 2).float() / d))
            self.rope = torch.stack([angles.cos(), angles.sin()], -1).to(DTYPE)
            self.mask = torch.tril(torch.ones(max_seq_length, max_seq_length, dtype=torch.bool))

        def forward(self, ids: Tensor, pos: Tensor) -> Tensor:
            mask, rope = self.mask[None, None, pos], self.rope[pos]
            x = self.tok_embeddings(ids)
            for layer in self.layers:
                x = layer(x, pos, rope, mask)
            logits: Tensor = self.output(self.norm(x))
            return logits

    def decode_one(model: Model, x: Tensor, pos: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
        logits = model(x, pos)[:, -1] / temperature
        kept, _ = torch.topk(logits, top_k)
        probs = torch.softmax(torch.where(logits < kept[..., -1:], -float("inf"), logits), dim=-1)
        noise = torch.empty_like(probs).exponential_(1)
        return torch.argmax(probs / noise, dim=-1, keepdim=True).to(torch.int), probs

    with torch.device("meta"):
        return Model(), decode_one


def transformers(r: Report, options: list[str]) -> None:
    """transformers' `generate` with SDPA and a dynamic cache, on the same architecture with random weights."""
    run_child(r, "transformers", options)


def child_transformers() -> None:
    model = _llama_of_transformers()
    if CUDA:
        torch.backends.cuda.enable_cudnn_sdp(False)  # else the timing would include its plans, one per length
    new = 24 if CUDA else 4
    for batch in (1, 8, 32) if CUDA else (1,):
        ids = torch.randint(0, model.config.vocab_size, (batch, 512 if CUDA else 8), device=DEVICE)
        _generate(model, ids, 2)  # warm up
        if batch == 1:
            tokens = _generate(model, ids, new)[1:-1]
            seconds = statistics.median(b - a for a, b in itertools.pairwise(tokens))
        else:  # streaming supports only one sequence: subtract a run of one token
            whole, one = (_generate(model, ids, count)[-1] for count in (new, 1))
            seconds = (whole - one) / (new - 1)
        emit(f"transformers B={batch}", {"ms": round(1e3 * seconds, 2), "tok_s": round(batch / seconds, 1)})


def _llama_of_transformers() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000 if CUDA else 128, hidden_size=4096 if CUDA else 64, intermediate_size=11008 if CUDA else 96,
        num_hidden_layers=32 if CUDA else 2, num_attention_heads=32 if CUDA else 4, max_position_embeddings=4096,
        dtype=DTYPE,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(DTYPE).to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    rotary = model.model.rotary_emb  # its buffers have no values after to_empty
    for name, value in type(rotary)(config=config).named_buffers():
        setattr(rotary, name, value.to(DEVICE))
    return model


class _Times(list[float]):
    """A streamer that records when tokens come."""

    def put(self, _: Any) -> None:
        self.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: Any, ids: Tensor, count: int) -> list[float]:
    """Times of the prompt, of each token (for one sequence), and of the end, in seconds from the start."""
    times = _Times()
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0, streamer=times if ids.size(0) == 1 else None,
        )  # fmt: skip
    sync()
    return [at - begin for at in [*times, time.perf_counter()]]
