"""Runs a comparison: contenders in turns, in rounds, and their ratios."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from llama_tp.bench.compare.process import ContenderFailed, ContenderProcess
from llama_tp.bench.compare.rounds import Meter, Round, chosen, needs_another
from llama_tp.bench.compare.sources import Source
from llama_tp.bench.compare.spec import PACKAGES, Spec
from llama_tp.bench.compare.table import Result, show
from llama_tp.bench.contenders import Timing
from llama_tp.bench.machine import cpu_name, load_average
from llama_tp.bench.neighbour import Conditions, Neighbour
from llama_tp.bench.report import finish
from llama_tp.threads import bound_spinning


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is compared, and how often."""

    batches: list[int]
    """Sequences decoded at the same time."""
    context: int
    """Tokens of each prompt, where decode is measured."""
    prompt: int
    """Tokens of the prompt, where prefill is measured."""
    new: int
    rounds: int
    repeats: int
    """Most rounds that are repeated because other work disturbed them."""
    threads: int
    limit_s: float
    """Longest time for one answer of a contender."""
    neighbour: bool

    def __post_init__(self) -> None:
        if not self.batches or not all(type(size) is int and size > 0 for size in self.batches):
            raise ValueError(f"batch={','.join(map(str, self.batches))} must be integers of at least 1, such as 1,16")
        for name, least in (("context", 1), ("prompt", 2), ("new", 2), ("rounds", 1), ("repeats", 0), ("threads", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if isinstance(self.limit_s, bool) or not isinstance(self.limit_s, (int, float)) or not self.limit_s > 0:
            raise ValueError(f"limit_s={self.limit_s!r} must be a number of seconds above 0")
        if not isinstance(self.neighbour, bool):
            raise ValueError(f"neighbour={self.neighbour!r} must have no value")

    @property
    def cases(self) -> list[Case]:
        decode = [Case(f"decode B={size}", size, self.context, self.new) for size in self.batches]
        return [*decode, Case(f"prefill {self.prompt}", 1, self.prompt, 2)]


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement of every contender."""

    name: str
    batch: int
    prompt: int
    new: int

    def tokens_per_s(self, timing: Timing) -> float:
        if self.name.startswith("prefill"):
            return self.batch * self.prompt / timing.prefill_s
        return timing.decoded / timing.decode_s


Prompts = list[list[int]]
Rates = dict[tuple[str, str, str], float]
"""Tokens per second of one round by contender, case and condition."""


@dataclass(slots=True)
class Contestant:
    """A contender, its process, and why it has none."""

    spec: Spec
    process: ContenderProcess | None = None
    version: str = ""
    failure: str | None = None
    first_tokens: tuple[int, ...] = ()

    def fail(self, reason: str) -> None:
        self.process, self.failure = None, reason
        print(f"{self.spec.name} {reason}", file=sys.stderr, flush=True)


def bench_compare(source: Source, specs: Sequence[Spec], settings: Settings, plot: str | None) -> None:
    """Implements `llama-tp bench compare`."""
    print(
        f"{source.name}: {cpu_name()}, {settings.threads} thread(s) each; {settings.new} new tokens, decode after "
        f"{settings.context}; {settings.rounds} rounds; load average {load_average():.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="llama_tp.compare.") as folder:
        contestants = [Contestant(spec) for spec in specs]
        try:
            for one in contestants:
                _start(one, source, settings, Path(folder))
            rounds, rates = _play(contestants, source.args.vocab_size, settings)
        finally:
            for one in contestants:
                if one.process is not None:
                    one.process.close()
    kept = chosen(rounds, settings.rounds)
    names = [case.name for case in settings.cases]
    results = [_result(one, names, [rates[index] for index in kept]) for one in contestants]
    ratios = show(results, names, rounds, kept)
    document = {
        "model": source.name,
        "device": cpu_name(),
        **{name: value for name, value in asdict(settings).items() if name != "rounds"},
        "contenders": [asdict(result) for result in results],
        "ratios": [asdict(ratio) for ratio in ratios],
        "rounds": [{**asdict(one), "counts": index in kept} for index, one in enumerate(rounds)],
    }
    finish("compare", document, plot)


def environment_of(threads: int) -> dict[str, str]:
    """A contender's: as many threads, which wait as those of `llama-tp serve` do."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    bound_spinning(environment)
    return environment


def _start(one: Contestant, source: Source, settings: Settings, folder: Path) -> None:
    """Start a contender and let it load its weights."""
    module, extra = PACKAGES.get(one.spec.engine, ("torch", ""))
    if find_spec(module) is None:
        one.fail(f"is not installed: pip install '{extra}'")
        return
    print(f"Loading {one.spec.name} ...", file=sys.stderr, flush=True)
    work = {
        "form": one.spec.form,
        "threads": settings.threads,
        "batch": max(settings.batches),
        "prompt": max(settings.prompt, settings.context),
        "new": settings.new,
        **source.of(one.spec),
    }
    log = folder / f"{one.spec.name}.log"
    try:
        one.process = ContenderProcess(environment_of(settings.threads), log, settings.limit_s)
        one.version = one.process.load(one.spec.engine, work)
    except ContenderFailed as failure:
        one.fail(str(failure))


def _play(contestants: Sequence[Contestant], vocab_size: int, settings: Settings) -> tuple[list[Round], list[Rates]]:
    """All rounds, after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    rounds: list[Round] = []
    rates: list[Rates] = []
    with _conditions(settings.neighbour) as (found, neighbour):
        _play_round(contestants, vocab_size, settings, generator, found, 0)
        while needs_another(rounds, settings.rounds, settings.repeats):
            meter = Meter(lambda: _cpu_s(contestants, neighbour))
            rates.append(_play_round(contestants, vocab_size, settings, generator, found, len(rounds)))
            rounds.append(meter.round())
            print(
                f"Round {len(rounds)}: load average {rounds[-1].load_average:.1f}, other processes used "
                f"{rounds[-1].other_cores:.2f} cores",
                flush=True,
            )
    return rounds, rates


@contextmanager
def _conditions(with_neighbour: bool) -> Iterator[tuple[Conditions, Neighbour | None]]:
    if not with_neighbour:
        yield Conditions(None), None
        return
    with Neighbour() as neighbour:
        yield Conditions(neighbour), neighbour


def _cpu_s(contestants: Sequence[Contestant], neighbour: Neighbour | None) -> float:
    own = sum(one.process.cpu_s for one in contestants if one.process is not None)
    return own + (neighbour.cpu_s if neighbour else 0.0)


def _play_round(
    contestants: Sequence[Contestant],
    vocab_size: int,
    settings: Settings,
    generator: torch.Generator,
    found: Conditions,
    number: int,
) -> Rates:
    """Every case under every condition by every contender that still runs, each round in another order."""
    start = number % len(contestants)
    rates: Rates = {}
    for case in settings.cases:
        for condition in found.names:
            # All contenders get the same new prompts, so that no prefix cache already holds them.
            prompts = torch.randint(vocab_size, (case.batch, case.prompt), generator=generator).tolist()
            for one in [*contestants[start:], *contestants[:start]]:
                with found.under(condition):
                    timing = _run(one, prompts, case.new)
                if timing is not None:
                    rates[one.spec.name, case.name, condition] = case.tokens_per_s(timing)
    return rates


def _run(one: Contestant, prompts: Prompts, new: int) -> Timing | None:
    if one.process is None:
        return None
    try:
        timing = one.process.run(prompts, new)
    except ContenderFailed as failure:
        one.fail(str(failure))
        return None
    if not one.first_tokens:
        one.first_tokens = timing.first_tokens
    return timing


def _result(one: Contestant, cases: Sequence[str], rounds: Sequence[Rates]) -> Result:
    """The medians of one contender, and its rates in each round: a contender that fails has none."""
    found: dict[str, dict[str, list[float]]] = {}
    if one.failure is None:
        for rates in rounds:
            for (name, case, condition), rate in rates.items():
                if name == one.spec.name:
                    found.setdefault(condition, {}).setdefault(case, []).append(rate)
    medians = {
        condition: {case: statistics.median(by_case[case]) for case in cases} for condition, by_case in found.items()
    }
    return Result(one.spec.name, one.spec.is_ours, one.version, one.failure, medians, found, one.first_tokens)
