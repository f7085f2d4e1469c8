"""From a checkpoint to an engine on a GPU: loading, real weights, and memory limits."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import llama_tp
from gpu.device import CUDA, DEVICE, DTYPE, SMOKE, THREADS, seconds_of
from gpu.models import agreement, build_local_model, greedy, model_args, random_prompts, write_random_checkpoint
from gpu.report import Report
from llama_tp.config import EngineConfig
from llama_tp.engine import startup as loading
from llama_tp.engine.engine import Engine
from llama_tp.engine.memory import MemoryModel
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group

ALONE = Group(SingleComm(), DEVICE, None)
ALONE_ON_CPU = Group(SingleComm(), torch.device("cpu"), None)


def _free_gb() -> float:
    return round(torch.cuda.mem_get_info()[0] / 1e9, 2) if CUDA else 0.0


def _release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def load(r: Report) -> None:
    """Startup on one GPU: write a checkpoint, join, load it through DTensor onto the device, generate."""
    args = model_args("tiny")
    if CUDA:
        args = ModelArgs(dim=2048, n_layers=16, n_heads=16, n_kv_heads=8, vocab_size=32000, ffn_hidden_dim=5632)
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        begin = time.perf_counter()
        size = write_random_checkpoint(Path(folder), args)
        r.put("save_gb_s", round(size / 1e9 / (time.perf_counter() - begin), 2))
        r.expect("join", llama_tp.join(DEVICE.type).device == DEVICE)
        memories = (None, 0.5) if CUDA else (None, "1MiB")
        for memory in memories:
            config = EngineConfig(
                max_seq_len=512 if CUDA else 64, max_batch_size=4, kv_cache_memory=memory, threads=THREADS
            )

            def measure() -> dict[str, Any]:
                before = _free_gb()
                begin = time.perf_counter()
                engine = llama_tp.load_engine(folder, args, config, ALONE)
                seconds = time.perf_counter() - begin
                tokens = greedy(engine, random_prompts([20, 40], args.vocab_size), 4)
                return {
                    "gb_s": round(size / 1e9 / seconds, 2), "s": round(seconds, 2), "dtype": str(engine.runner.dtype),
                    "cache_tokens": engine.config.cache_tokens, "taken_gb": round(before - _free_gb(), 2),
                    "tokens": tokens,
                }  # fmt: skip

            r.guard(f"load_engine, kv_cache_memory={memory}", measure)
            _release()
        files = list(Path(folder).glob("*.distcp"))
        raw = seconds_of(lambda: [path.read_bytes() for path in files])
        r.put("raw_read_gb_s", round(size / 1e9 / raw, 2))


def demo(r: Report, checkpoint: str) -> None:
    """Real weights: greedy tokens of a converted checkpoint, on the GPU against the CPU in float32."""
    args = ModelArgs.load(Path(checkpoint, "model_args.json"))
    rng = random.Random(1)
    # "What is the capital of France?" in SmolLM2's ids; for other models just some prompt.
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]]
    prompts += [[rng.randrange(args.vocab_size) for _ in range(length)] for length in (3, 40, 150)]
    prompts = [[token % args.vocab_size for token in prompt] for prompt in prompts]
    new = 6 if SMOKE else 24

    def tokens(group: Group, dtype: str) -> list[list[int]]:
        config = EngineConfig(max_seq_len=256, max_batch_size=4, dtype=dtype, threads=THREADS)
        return greedy(llama_tp.load_engine(checkpoint, args, config, group), prompts, new)

    expected = r.put("on the CPU, float32", tokens(ALONE_ON_CPU, "float32"))
    got = tokens(ALONE, "float32")
    r.expect("float32", got == expected, {f"of {new}": agreement(got, expected)})
    r.put("bfloat16", {f"of {new}": agreement(tokens(ALONE, "bfloat16"), expected)})


def memory(r: Report) -> None:
    """Check the memory model: with little memory left, nothing runs out of memory."""
    args = model_args("tiny" if SMOKE else "8b")
    length, batch = (64, 4) if SMOKE else (8192, 64)
    with _without_checkpoint(args):
        for budget in (32,) if SMOKE else (512, 2048):
            config = EngineConfig(
                max_seq_len=length, max_batch_size=batch, max_batched_tokens=budget, threads=THREADS, compile=False
            )
            begin = time.perf_counter()
            engine = llama_tp.load_engine("", args, config, ALONE)
            seconds = round(time.perf_counter() - begin, 2)
            found = {"s": seconds, "cache_tokens": engine.config.cache_tokens, "free_gb": _free_gb()}
            r.put(f"by default, chunks of {budget}", found)
            del engine
            _release()
        size = max(0, torch.cuda.mem_get_info()[0] - 16 * 10**9) if CUDA else 0
        ballast = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        r.put("free GB after the weights and a ballast", _free_gb())
        config = EngineConfig(
            max_seq_len=length, max_batch_size=2 * batch, max_batched_tokens=2048, threads=THREADS, compile=False,
            kv_cache_memory=0.99 if CUDA else "1MiB",
        )  # fmt: skip
        engine = llama_tp.load_engine("", args, config, ALONE)
        r.put("tight", {"cache_tokens": engine.config.cache_tokens, "free_gb": _free_gb()})
        _generate_with_everything(r, engine, args, length)
        del ballast


@contextmanager
def _without_checkpoint(args: ModelArgs) -> Iterator[None]:
    """Make load_engine use an existing model with random weights."""
    model = build_local_model(args)
    with ExitStack() as stack:
        for owner, name, replacement in (
            (loading, "StoredFiles", lambda *_: SimpleNamespace(dtype=DTYPE, formats={})),
            (loading, "load_model", lambda *_, **__: model),
            (loading, "resolve_dtype", lambda *_: DTYPE),
            (MemoryModel, "check", lambda *_: None),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _generate_with_everything(r: Report, engine: Engine, args: ModelArgs, length: int) -> None:
    params = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, logprobs=20, max_new_tokens=4, seed=1
    )
    lengths = [length - 14, 5, length // 8, length // 2, *[length // 4 if SMOKE else 30] * 60]
    begin = time.perf_counter()
    out = engine.generate(random_prompts(lengths, args.vocab_size), params)
    found = {"s": round(time.perf_counter() - begin, 2), "free_gb": _free_gb()}
    if CUDA:
        found["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    is_right = all(len(one.token_ids) == 4 and one.error is None for one in out)
    r.expect("tight: 64 requests with every sampling option", is_right, found)
