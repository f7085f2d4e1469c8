"""llama_tp's engine on the GPU: correctness against the CPU, and speed."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.device import CUDA, DTYPE, MAX_ERROR, SMOKE, cudnn_attention, kernel_times, relative_error, sync
from gpu.models import (
    StubComm,
    agreement,
    build_local_model,
    copy_of,
    greedy,
    make_engine,
    model_args,
    random_prompts,
    weight_bytes,
    with_roofline,
)  # fmt: skip
from gpu.prototype import errors_against, measure_prototype
from gpu.report import Report
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model.attention.sdpa import SdpaStep
from llama_tp.model.transformer import Transformer
from llama_tp.model_args import ModelArgs

CPU = torch.device("cpu")
_LIMITS: dict[str, Any] = {"max_seq_len": 192, "max_batch_size": 4, "max_batched_tokens": 64}


def correct(r: Report) -> None:
    """The engine on the GPU against the CPU in float32: logits and greedy tokens; and the prototype."""
    with cudnn_attention(False):  # it would build a plan for every length
        for name in ("tiny",) if SMOKE else ("small mha", "small gqa", "small 3to1"):
            _Correctness(name).check(r)


class _Correctness:
    def __init__(self, name: str) -> None:
        self.name = name
        self.args = model_args(name)
        self.reference = build_local_model(self.args, dtype=torch.float32, device=CPU)
        self.prompts = random_prompts([5, 37, 64, 130, 3], self.args.vocab_size)
        self.expected = greedy(self.on_cpu(), self.prompts, 12)

    def on_cpu(self) -> Engine:
        return make_engine(self.reference, self.args.n_kv_heads, device=CPU, dtype=torch.float32, **_LIMITS)

    def twin(self, dtype: torch.dtype, **more: Any) -> Engine:
        """On the GPU, with the same weights."""
        model = copy_of(self.reference, self.args, dtype)
        return make_engine(model, self.args.n_kv_heads, dtype=dtype, **{**_LIMITS, **more})

    def check(self, r: Report) -> None:
        for label, more in (
            ("float32", {}),
            ("float32, prefix cache", {"prefix_cache": True}),
            ("float32, few pages: preemption, scattered pages", {"cache_pages": 16}),
            ("float32, deterministic", {"deterministic": True}),
        ):
            got = greedy(self.twin(torch.float32, **more), self.prompts, 12)
            r.expect(f"{self.name}: {label}, tokens", got == self.expected, {"of 12": agreement(got, self.expected)})
        for deterministic in (False, True):
            got = greedy(self.twin(DTYPE, deterministic=deterministic), self.prompts, 12)
            label = "bfloat16, deterministic" if deterministic else "bfloat16"
            r.put(f"{self.name}: {label}, tokens", {"of 12": agreement(got, self.expected)})
        for dtype, limit in MAX_ERROR.items():
            error = self.logits_error(dtype)
            r.expect(f"{self.name}: {dtype}, error of logits", error < limit, error)
        sampled, again = (self.sampled() for _ in range(2))
        r.expect(f"{self.name}: sampling with every option is reproducible", sampled == again, sampled)
        dtype = DTYPE if CUDA else torch.float32  # on a CPU, bfloat16 says little about the kernels
        for label, found in errors_against(self.twin(dtype), self.prompts[:4]).items():
            r.expect(f"{self.name}: prototype, {label}, against llama_tp", found["error"] < MAX_ERROR[dtype], found)

    def logits_error(self, dtype: torch.dtype) -> float:
        plan = StepPlan(1, (Chunk(0, 0, tuple(self.prompts[2]), 1),), tuple((0, i, i) for i in range(12)))
        ours, theirs = (engine.runner.execute(plan) for engine in (self.twin(dtype), self.on_cpu()))
        assert ours is not None
        assert theirs is not None
        return relative_error(ours.cpu(), theirs)

    def sampled(self) -> list[list[int]]:
        params = SamplingParams(
            temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, logit_bias={3: 1.0}, seed=1,
            logprobs=2, max_new_tokens=8,
        )  # fmt: skip
        return [one.token_ids for one in self.twin(torch.float32).generate(self.prompts[:3], params)]


def engine(r: Report) -> None:
    """7B with random weights, decoding: whole steps, and until execute and sample have returned."""
    args = model_args("tiny" if SMOKE else "7b")
    new, prompt, batches = (3, 20, (1, 2)) if SMOKE else (24, 512, (1, 8, 32, 128))
    limits: dict[str, Any] = {"max_seq_len": prompt + 64, "max_batch_size": batches[-1], "max_batched_tokens": 8192}
    engine = make_engine(build_local_model(args), args.n_kv_heads, **limits)
    r.put("cache_gb", round(engine.runner.cache.nbytes / 1e9, 2))

    def measure(lengths: list[int], steps: int, seconds: float) -> dict[str, Any]:
        return with_roofline(r, _decode(engine, args, lengths, steps, min(seconds, r.left() / 3)), args)

    if CUDA:  # the cost of cuDNN's plans, one per new length: load_engine disables it
        with cudnn_attention(True):
            r.guard("B=1 with cuDNN", lambda: measure([prompt], 12, 12))
    with cudnn_attention(False):
        for batch in batches:
            r.guard(f"B={batch}", lambda: measure([prompt] * batch, new, 25))
        rng = random.Random(0)
        for batch in batches[-2:]:
            lengths = [rng.randint(prompt // 8, prompt) for _ in range(batch)]
            r.guard(f"B={batch}, mixed lengths", lambda: measure(lengths, max(2, new // 2), 20))
    if CUDA:
        r.put("peak_gb", round(torch.cuda.max_memory_allocated() / 1e9, 2))


def _decode(engine: Engine, args: ModelArgs, lengths: list[int], steps: int, seconds: float) -> dict[str, Any]:
    """Prefill prompts of these lengths, then time decode steps."""
    until = time.monotonic() + seconds
    try:
        filled_s = _fill(engine, args, lengths, steps, until)
        found = _decode_steps(engine, lengths, steps, until)
        found["prefill_tok_s"] = round(sum(lengths) / filled_s)
        if CUDA and time.monotonic() < until + 3:
            try:
                found["profile"] = kernel_times(engine.step, 12)
            except Exception as error:  # from the profiler; the timings are still valid
                found["profile"] = str(error)[:200]
        return found
    finally:
        for request in engine.scheduler.request_ids():
            engine.cancel(request)


def _decode_steps(engine: Engine, lengths: list[int], steps: int, until: float) -> dict[str, Any]:
    parts: dict[str, list[float]] = {"plan": [], "execute": [], "sample": [], "step": []}
    undo = [
        _time_calls(engine.scheduler, "plan", parts["plan"]),
        _time_calls(engine.runner, "execute", parts["execute"]),
        _time_calls(engine.sampler, "sample", parts["sample"]),
        _time_calls(engine, "step", parts["step"]),
    ]
    for i in range(steps):
        engine.step()
        if time.monotonic() > until and i >= 2:
            break
    for one in undo:
        one()
    guess = engine.runner._guess
    layout = guess.passes[0].batch.attention if guess else None
    median = {key: round(statistics.median(times[2:] or times), 3) for key, times in parts.items() if times}
    return {
        "batch": len(lengths),
        "context": round(statistics.mean(lengths) + len(parts["step"]) / 2),
        "ms": median,
        "tok_s": round(1e3 * len(lengths) / median["step"], 1),
        "min_step_ms": round(min(parts["step"]), 3),
        "steps": len(parts["step"]),
        "attention calls of a layer": len(layout.calls) if isinstance(layout, SdpaStep) else None,
    }


def _fill(engine: Engine, args: ModelArgs, lengths: list[int], steps: int, until: float) -> float:
    """Seconds of prefill."""
    budget = engine.config.max_batched_tokens - len(lengths)
    new = steps + 8 + 2 * -(-sum(lengths) // max(1, budget))  # sequences prefilled first decode meanwhile
    for i, prompt in enumerate(random_prompts(lengths, args.vocab_size, seed=len(lengths))):
        engine.add(Request(str(i), tuple(prompt), SamplingParams(temperature=0, max_new_tokens=new)))
    begin = time.perf_counter()
    while engine.scheduler.num_waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
        if time.monotonic() > until:
            break
    sync()
    return time.perf_counter() - begin


def _time_calls(owner: Any, name: str, times: list[float]) -> Callable[[], None]:
    """Record the milliseconds of each call of a method. Call the result to stop."""
    function = getattr(owner, name)

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            times.append(1e3 * (time.perf_counter() - begin))

    setattr(owner, name, timed)
    return lambda: delattr(owner, name)


def prefill(r: Report) -> None:
    """7B: one prompt at a time, by length and chunk size."""
    args = model_args("tiny" if SMOKE else "7b")
    model = build_local_model(args)
    gemm_tflops = r.get("ceilings", "gemm_8192_tflops", 700.0)
    for budget in (512, 2048):
        for tokens in (40,) if SMOKE else (512, 2048):

            def measure() -> dict[str, Any]:
                seconds = _prefill_seconds(model, args, tokens, budget)
                best = min(seconds[1:])
                share = _prefill_flops(args, tokens) / best / gemm_tflops / 1e12
                times = [round(1e3 * one, 1) for one in seconds]
                return {"ms": times, "tok_s": round(tokens / best), "of_gemm_rate": round(share, 3)}

            with cudnn_attention(False):
                r.guard(f"prompt {tokens}, chunks of {budget}", measure)


def _prefill_seconds(model: Transformer, args: ModelArgs, tokens: int, budget: int) -> list[float]:
    limits: dict[str, Any] = {"max_seq_len": tokens + 8, "max_batch_size": 2, "max_batched_tokens": budget}
    engine = make_engine(model, args.n_kv_heads, **limits)
    times = []
    for i in range(2 if SMOKE else 5):
        prompt = random_prompts([tokens], args.vocab_size, seed=i)[0]
        engine.add(Request(str(i), tuple(prompt), SamplingParams(temperature=0, max_new_tokens=1)))
        begin = time.perf_counter()
        while engine.num_requests:
            engine.step()
        times.append(time.perf_counter() - begin)
    return times


def _prefill_flops(args: ModelArgs, tokens: int) -> float:
    layers = weight_bytes(args) / 2 - args.vocab_size * args.dim
    return 2 * layers * tokens + 2 * args.n_layers * args.dim * tokens**2 + 2 * args.vocab_size * args.dim


def slice70b(r: Report) -> None:
    """One rank of 70B at TP 8 without collectives: the engine, then the prototype."""
    args = model_args("tiny 70b" if SMOKE else "70b")
    prompt, batches = (20, (1, 2)) if SMOKE else (512, (1, 32))
    limits: dict[str, Any] = {"max_seq_len": prompt + 64, "max_batch_size": batches[-1], "max_batched_tokens": 8192}
    _measure_slice(r, make_engine(build_local_model(args, StubComm(8)), 1, **limits), args, prompt, batches)
    gc.collect()
    measure_prototype(r, "70b", batches, 8)


def _measure_slice(r: Report, engine: Engine, args: ModelArgs, prompt: int, batches: tuple[int, ...]) -> None:
    for batch in batches:

        def measure() -> dict[str, Any]:
            steps, seconds = 3 if SMOKE else 16, min(12, r.left() / 3)
            return with_roofline(r, _decode(engine, args, [prompt] * batch, steps, seconds), args, 8)

        with cudnn_attention(False):
            r.guard(f"engine, B={batch}", measure)
