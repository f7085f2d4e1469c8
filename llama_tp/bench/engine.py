"""`llama-tp bench engine`: prefill and decode rates of the engine, optionally against transformers.

Greedy, without early stops, all prompts of one length. Contenders and batch sizes alternate, so that drift in the
machine's speed affects all of them. Reports medians.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from llama_tp.bench.peers import transformers_model
from llama_tp.checkpoint.store.reading import load, stored_dtype
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join

Prompts = list[list[int]]

_SETTINGS: dict[str, dict[str, Any]] = {
    "deterministic": {"deterministic": True},
    "no_prefix_cache": {"prefix_cache": False},
    "no_speculation": {"speculative_tokens": 0},
}
"""Contenders that are our own engine in a different configuration."""
CONTENDERS = ("transformers", *_SETTINGS)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one batch size. Rates are over the whole batch."""

    contender: str
    batch: int
    prompt: int
    new: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    runs: int
    drafted_tokens: int
    """Predicted and computed ahead, in all runs."""
    accepted_tokens: int
    """How many of those were right."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run. The prefill ends with the last prompt's first token and includes decodes computed alongside prompts."""

    prefill_s: float
    decode_s: float
    decoded: int
    """Tokens sampled after the prefill."""
    drafted: int = 0
    """Tokens predicted by speculative decoding, and how many were right."""
    accepted: int = 0


class Contender(Protocol):
    name: str

    def run(self, prompts: Prompts, new: int) -> Timing:
        """Generate exactly `new` tokens for each prompt."""
        ...


class OurEngine:
    name = "llama_tp"

    def __init__(self, engine: Engine, name: str = name) -> None:
        self.engine = engine
        self.name = name
        self._ids = count()

    def run(self, prompts: Prompts, new: int) -> Timing:
        params = SamplingParams(max_new_tokens=new, temperature=0)
        waiting = set()
        for prompt in prompts:
            request = Request(f"bench {next(self._ids)}", tuple(prompt), params)
            waiting.add(request.id)
            self.engine.add(request)
        before = self.engine.stats()
        start = perf_counter()
        while waiting:
            waiting -= {event.request_id for event in self.engine.step()}
        first, decoded = perf_counter(), 0
        while self.engine.num_requests:
            decoded += len(self.engine.step())
        decode_s, after = perf_counter() - first, self.engine.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        return Timing(first - start, decode_s, decoded, drafted, after.accepted_tokens - before.accepted_tokens)


class Transformers:
    """transformers' `generate`, with SDPA attention and its default dynamic cache."""

    name = "transformers"

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, prompts: Prompts, new: int) -> Timing:
        ids = torch.tensor(prompts)
        times = _Times([perf_counter()])
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                streamer=times,
            )
        start, _, first, *_, last = times
        assert len(times) == 2 + new
        return Timing(first - start, last - first, len(prompts) * (new - 1))


class _Times(list[float]):
    """A transformers streamer that records when it gets the prompts, and then each step's tokens."""

    def put(self, _tokens: torch.Tensor) -> None:
        self.append(perf_counter())

    def end(self) -> None:
        pass


def bench_engine(
    checkpoint: str,
    *,
    batches: list[int],
    prompt: int,
    prefix: int,
    new: int,
    runs: int,
    against: str | None,
    dtype: str,
    compile: bool | str,
    device: str,
    threads: int | None,
    max_batched_tokens: int,
    speculative_tokens: int,
    speculative_max_batch: int,
) -> None:
    """Implements `llama-tp bench engine`. Call it on every rank."""
    _check_settings(batches, prompt, prefix, new, runs, against)
    args = ModelArgs.load_converted(Path(checkpoint, "model_args.json"))
    config = EngineConfig(
        max_seq_len=prompt + new,
        max_batch_size=max(batches),
        max_batched_tokens=max(max_batched_tokens, *batches),
        speculative_tokens=speculative_tokens,
        speculative_max_batch=speculative_max_batch,
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
    )
    group = join(device, timeout_s=config.collective_timeout_s)
    if against in _SETTINGS and group.comm.size > 1:
        raise ValueError(f"against={against} needs a single rank; run it without torchrun")
    engine = load_engine(checkpoint, args, config, group)
    if not engine.is_leader:
        engine.follow()
        group.comm.close()
        return
    contenders: list[Contender] = [OurEngine(engine)]
    if against in _SETTINGS:
        config = replace(config, **_SETTINGS[against])
        contenders.append(OurEngine(load_engine(checkpoint, args, config, group), name=against))
    elif against:
        contenders.append(Transformers(transformers_model(args, _read_all(checkpoint, args), engine.runner.dtype)))
    runner = engine.runner
    begin = f", {prefix} of them shared" if prefix else ""
    print(
        f"{checkpoint}: {group.comm.size} rank(s) of {torch.get_num_threads()} thread(s), {runner.device.type}, "
        f"{runner.dtype}; prompts of {prompt} tokens{begin}, {new} new; median of {runs} runs; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    rows = _measure(contenders, batches, args.vocab_size, prompt, prefix, new, runs)
    _show(rows, len(contenders))
    engine.release()
    group.comm.close()
    print(json.dumps([asdict(row) for row in rows]))


def _check_settings(batches: list[int], prompt: int, prefix: int, new: int, runs: int, against: str | None) -> None:
    if against is not None and against not in CONTENDERS:
        raise ValueError(f"against={against!r} must be one of {', '.join(CONTENDERS)}")
    if against == "transformers" and find_spec("transformers") is None:
        raise ValueError("against=transformers: transformers is not installed; run pip install 'llama-tp[bench]'")
    if not batches or not all(isinstance(size, int) and size > 0 for size in batches):
        raise ValueError(f"batch={','.join(map(str, batches))} must be integers of at least 1, such as 1,4,16")
    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    if new < 2:
        raise ValueError(f"new={new} must be at least 2: the first token belongs to the prefill")
    if not 0 <= prefix < prompt:
        raise ValueError(f"prefix={prefix} must be at least 0 and less than prompt={prompt}, which includes it")


def _measure(
    contenders: list[Contender], batches: list[int], vocab_size: int, prompt: int, prefix: int, new: int, runs: int
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(vocab_size, (prefix,), generator=generator).tolist()
    keys = [(size, contender.name) for size in batches for contender in contenders]
    runs_of: dict[tuple[int, str], list[Timing]] = {key: [] for key in keys}
    turns = [(run, size) for run in range(runs + 1) for size in batches]
    screen = Console(stderr=True)
    for run, size in track(turns, console=screen, transient=True, disable=not screen.is_terminal):
        ends = torch.randint(vocab_size, (size, prompt - prefix), generator=generator).tolist()
        for contender in contenders:
            timing = contender.run([beginning + end for end in ends], new)
            if run:  # the first run is a warm-up
                runs_of[size, contender.name].append(timing)
    rows = []
    for (size, name), timings in runs_of.items():
        prefill = statistics.median(size * prompt / timing.prefill_s for timing in timings)
        decode = statistics.median(timing.decoded / timing.decode_s for timing in timings)
        drafted, accepted = sum(timing.drafted for timing in timings), sum(timing.accepted for timing in timings)
        rows.append(Row(name, size, prompt, new, prefill, decode, runs, drafted, accepted))
    return rows


def _show(rows: list[Row], num_contenders: int) -> None:
    """Print a table: contenders by batch size, with the ratios of ours to the others; then the gain from batching."""
    print(f"{'':<16}{'batch':>6}{'prefill tok/s':>15}{'decode tok/s':>14}")
    for first in range(0, len(rows), num_contenders):
        ours, *others = rows[first : first + num_contenders]
        for row in (ours, *others):
            print(_line(row.contender, row.batch, row.prefill_tokens_per_s, row.decode_tokens_per_s))
        for row in others:
            prefill = ours.prefill_tokens_per_s / row.prefill_tokens_per_s
            print(_line("  ratio", row.batch, prefill, ours.decode_tokens_per_s / row.decode_tokens_per_s))
    one, other = rows[0], rows[-num_contenders]
    if one is not other:
        gain = other.decode_tokens_per_s / one.decode_tokens_per_s
        print(f"batch {other.batch} decodes {gain:.2f} times as many tokens per second as batch {one.batch}")


def _line(name: str, batch: int, prefill: float, decode: float) -> str:
    return f"{name:<16}{batch:>6}{prefill:>15.2f}{decode:>14.2f}"


def _read_all(checkpoint: str, args: ModelArgs) -> dict[str, torch.Tensor]:
    """The full model as plain tensors, in the checkpoint's dtype."""
    dtype = stored_dtype(checkpoint)
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in weight_shapes(args).items()}
    if args.tied_embeddings:
        weights.pop("output.weight", None)
    load(weights, checkpoint)
    return weights
