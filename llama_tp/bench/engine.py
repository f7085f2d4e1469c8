"""`llama-tp bench engine`: prefill and decode rates of the engine, optionally against others.

Greedy, without early stops, all prompts of one length. Contenders, batch sizes, contexts and conditions alternate, so
that drift in the machine's speed affects all of them. Reports medians, and what share of the machine's read bandwidth
and matrix rate they are; both are measured before and after, and the better counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from llama_tp.bench.ceilings import CACHE_MULTIPLE, Ceilings, gemm_rate, measure_ceilings, read_bandwidth
from llama_tp.bench.contenders import Contender, OurEngine, Timing, Transformers, longest_sequence
from llama_tp.bench.engine_table import show
from llama_tp.bench.machine import device_name, forget_peak_memory, last_level_cache, load_average, peak_memory
from llama_tp.bench.neighbour import Conditions, conditions
from llama_tp.bench.peers import dense_weights, transformers_model
from llama_tp.bench.report import finish
from llama_tp.bench.structured import endless_records
from llama_tp.bench.subject import EngineOptions, Subject, join_group, kernels_of
from llama_tp.bench.unparallelized import unparallelized_engine
from llama_tp.bench.work import Work
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.parallel.launch import Group

_SETTINGS: dict[str, dict[str, Any]] = {
    "deterministic": {"deterministic": True},
    "no_prefix_cache": {"prefix_cache": False},
    "no_speculation": {"speculative_tokens": 0},
}
"""Contenders that are our own engine in a different configuration."""
CONTENDERS = ("transformers", "structured", "unparallelized", *_SETTINGS)
_TURN_S = 600.0
"""How long the other ranks wait while another contender has its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    batches: list[int]
    prompt: int
    """Tokens per prompt."""
    depths: list[int]
    """More contexts to decode in; a prompt of 1 token for 0."""
    prefix: int
    """Length of the common beginning of all prompts; of shorter ones, all but the last token."""
    new: int
    runs: int
    neighbour: bool

    def __post_init__(self) -> None:
        if not self.batches or not all(type(size) is int and size > 0 for size in self.batches):
            given = ",".join(map(str, self.batches))
            raise ValueError(f"batch={given} must be integers of at least 1, such as 1,4,16")
        if not all(type(depth) is int and depth >= 0 for depth in self.depths):
            given = ",".join(map(str, self.depths))
            raise ValueError(f"depth={given} must be integers of at least 0, such as 0,512,2048")
        if type(self.runs) is not int or self.runs < 1:
            raise ValueError(f"runs={self.runs!r} must be an integer of at least 1")
        if type(self.new) is not int or self.new < 2:
            raise ValueError(f"new={self.new!r} must be at least 2: the first token belongs to the prefill")
        if not 0 <= self.prefix < self.prompt:
            raise ValueError(
                f"prefix={self.prefix} must be at least 0 and less than prompt={self.prompt}, which includes it"
            )
        if not isinstance(self.neighbour, bool):
            raise ValueError(f"neighbour={self.neighbour!r} must have no value")

    @property
    def contexts(self) -> list[int]:
        """Tokens per prompt of all runs."""
        return sorted({self.prompt, *self.depths})

    def max_seq_len(self, max_batched_tokens: int, options: EngineOptions) -> int:
        return max(
            longest_sequence(
                size,
                max(1, context),
                self.new,
                max_batched_tokens,
                speculative_tokens=options.speculative_tokens,
                speculative_max_batch=options.speculative_max_batch,
            )
            for size in self.batches
            for context in self.contexts
        )

    def __str__(self) -> str:
        contexts = "/".join(map(str, self.contexts))
        shared = f", {self.prefix} of them shared" if self.prefix else ""
        return f"prompts of {contexts} tokens{shared}, {self.new} new; median of {self.runs} runs"


@dataclass(frozen=True, slots=True)
class Row:
    """One contender under one condition. Rates are over the whole batch."""

    contender: str
    condition: str
    batch: int
    context: int
    """Tokens of each prompt."""
    new: int
    prefill_tokens_per_s: float | None
    """None if the prompt is a single token."""
    prefill_share: float | None
    """Of the ceiling for matrix products."""
    decode_tokens_per_s: float
    decode_share: float
    """Of the read bandwidth."""
    step_p50_ms: float
    step_p99_ms: float
    drafted_tokens: int
    """Predicted by speculative decoding and computed ahead, in all runs."""
    accepted_tokens: int
    """How many of those were right."""


def bench_engine(
    subject: Subject,
    options: EngineOptions,
    plan: Plan,
    *,
    against: str | None,
    max_batched_tokens: int,
    plot: str | None,
) -> None:
    """Implements `llama-tp bench engine`. Call it on every rank."""
    _check_against(subject, against, options)
    if against == "unparallelized":
        options = replace(options, compile=False)
    budget = max(max_batched_tokens, *plan.batches)
    config = options.config(
        max_seq_len=plan.max_seq_len(budget, options),
        max_batch_size=max(plan.batches),
        max_batched_tokens=budget,
        collective_timeout_s=_TURN_S,
    )
    group = join_group(config)
    if against in ("unparallelized", *_SETTINGS) and group.comm.size > 1:
        raise ValueError(f"against={against} needs a single rank; run it without torchrun")
    read = read_bandwidth(group.device)  # before there is an engine: its memory does not count in the peak
    forget_peak_memory(group.device)
    engine = subject.load(config, group)
    dtype = engine.runner.dtype
    ceilings = Ceilings.of(read, gemm_rate(group.device, dtype), dtype)
    if not engine.is_leader:
        engine.follow()
        measure_ceilings(group.device, dtype)
        group.comm.close()
        return
    contenders = _contenders(subject, engine, config, group, against)
    where = _where(subject, engine, group)
    print(
        f"{subject.name}: {where['ranks']} rank(s) of {where['threads']} thread(s), {group.device.type}, "
        f"{where['dtype']}, {where['kernels']}; {plan}; load average {where['load_average']:.1f}",
        flush=True,
    )
    with conditions(with_neighbour=plan.neighbour) as found:
        timings = _measure(contenders, plan, subject.args.vocab_size, found)
    engine.release()
    peak = peak_memory(group.device)
    ceilings = ceilings.better(measure_ceilings(group.device, dtype))
    work = Work.of(engine)
    rows = [_row(*key, timings[key], plan, work, ceilings) for key in timings]
    notes = _notes(engine, work, group) + _notes_on_drafts(subject, rows)
    show(rows, ceilings, peak, notes)
    group.comm.close()
    document = {**where, **asdict(ceilings), "runs": plan.runs, "peak_memory_bytes": peak, "notes": notes}
    finish("engine", {**document, "rows": [asdict(row) for row in rows]}, plot)


def _check_against(subject: Subject, against: str | None, options: EngineOptions) -> None:
    if against is not None and against not in CONTENDERS:
        raise ValueError(f"against={against!r} must be one of {', '.join(CONTENDERS)}")
    if against == "transformers" and find_spec("transformers") is None:
        raise ValueError("against=transformers: transformers is not installed; run pip install 'llama-tp[bench]'")
    if against == "structured" and subject.checkpoint is None:
        raise ValueError("against=structured needs a tokenizer; give a converted checkpoint")
    if against in ("transformers", "unparallelized") and subject.formats:
        raise ValueError(f"against={against} needs dense weights; leave --quantization out")
    if against == "unparallelized" and options.compile is True:
        raise ValueError("against=unparallelized compares two forms of the model in PyTorch; leave --compile out")


def _contenders(
    subject: Subject, engine: Engine, config: EngineConfig, group: Group, against: str | None
) -> list[Contender]:
    contenders: list[Contender] = [OurEngine(engine)]
    if against in _SETTINGS:
        other = subject.load(replace(config, **_SETTINGS[against]), group)
        contenders.append(OurEngine(other, name=against))
    elif against == "structured":
        assert subject.checkpoint is not None, "checked above"
        grammar = endless_records(subject.checkpoint, subject.args.vocab_size)
        contenders.append(OurEngine(engine, name=against, grammar=grammar))
    elif against == "unparallelized":
        contenders.append(OurEngine(unparallelized_engine(subject, engine), name=against))
    elif against:
        weights = dense_weights(subject.args, subject.checkpoint)
        model = transformers_model(subject.args, weights, engine.runner.dtype)
        contenders.append(Transformers(model.to(group.device)))
    return contenders


def _where(subject: Subject, engine: Engine, group: Group) -> dict[str, Any]:
    return {
        "model": subject.name,
        "device": device_name(group.device),
        "ranks": group.comm.size,
        "threads": torch.get_num_threads(),
        "dtype": str(engine.runner.dtype).removeprefix("torch."),
        "kernels": kernels_of(engine),
        "load_average": load_average(),
    }


Key = tuple[int, int, str, str]
"""Batch size, context, condition, contender."""


def _measure(
    contenders: Sequence[Contender], plan: Plan, vocab_size: int, found: Conditions
) -> dict[Key, list[Timing]]:
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(vocab_size, (plan.prefix,), generator=generator).tolist()
    turns = [(run, size, context) for run in range(plan.runs + 1) for size in plan.batches for context in plan.contexts]
    timings: dict[Key, list[Timing]] = {
        (size, context, condition, contender.name): []
        for _, size, context in turns[: len(plan.batches) * len(plan.contexts)]
        for condition in found.names
        for contender in contenders
    }
    screen = Console(stderr=True)
    for run, size, context in track(turns, console=screen, transient=True, disable=not screen.is_terminal):
        length = max(1, context)
        shared = beginning[: length - 1]
        for condition in found.names:
            ends = torch.randint(vocab_size, (size, length - len(shared)), generator=generator).tolist()
            for contender in contenders:
                with found.under(condition):
                    timing = contender.run([shared + end for end in ends], plan.new)
                if run:  # the first run is a warm-up
                    timings[size, context, condition, contender.name].append(timing)
    return timings


def _row(
    size: int,
    context: int,
    condition: str,
    name: str,
    timings: Sequence[Timing],
    plan: Plan,
    work: Work,
    ceilings: Ceilings,
) -> Row:
    length = max(1, context)
    shared = min(plan.prefix, length - 1)
    prefill_s = statistics.median(timing.prefill_s for timing in timings)
    decode = statistics.median(timing.decoded / timing.decode_s for timing in timings)
    steps = sorted(step for timing in timings for step in timing.steps_s)
    steps_per_s = statistics.median(len(timing.steps_s) / timing.decode_s for timing in timings)
    read = work.decode_bytes(size, length + plan.new / 2, shared) * steps_per_s
    flops = work.prefill_flops(size, length, shared) / prefill_s
    return Row(
        contender=name,
        condition=condition,
        batch=size,
        context=context,
        new=plan.new,
        prefill_tokens_per_s=size * length / prefill_s if length > 1 else None,
        prefill_share=flops / ceilings.flops if length > 1 else None,
        decode_tokens_per_s=decode,
        decode_share=read / ceilings.read_bytes_per_s,
        step_p50_ms=1e3 * steps[len(steps) // 2],
        step_p99_ms=1e3 * steps[len(steps) * 99 // 100],
        drafted_tokens=sum(timing.drafted for timing in timings),
        accepted_tokens=sum(timing.accepted for timing in timings),
    )


def _notes_on_drafts(subject: Subject, rows: Sequence[Row]) -> list[str]:
    drafted = sum(row.drafted_tokens for row in rows)
    if not drafted:
        return []
    note = f"{sum(row.accepted_tokens for row in rows)} of {drafted} drafted tokens were right"
    if subject.checkpoint is None:
        note += "; models with random weights repeat themselves, so they gain more from drafts than others"
    return [note]


def _notes(engine: Engine, work: Work, group: Group) -> list[str]:
    notes = []
    cache = last_level_cache(group.device)
    if work.weight_bytes < CACHE_MULTIPLE * cache:
        notes.append(
            f"a step reads {work.weight_bytes / 1e6:.0f} MB of weights, less than {CACHE_MULTIPLE} times the cache of "
            f"{cache / 1e6:.0f} MB: part of them may come from there, so shares of read bandwidth are too high"
        )
    if engine.scheduler.num_preemptions:
        notes.append(
            f"{engine.scheduler.num_preemptions} preemptions: the KV cache of {engine.config.cache_tokens} tokens is "
            "too small for these batches; reduce --batch or --depth"
        )
    return notes
