"""An open-loop load and what it measures: the same for the offline engine and for a server.

`workload` says what arrives when, `Recorder` notes what came back when, `summarize` makes of it the figures that
`vllm bench serve` reports, under its names. Knows neither engine nor HTTP, and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import numpy as np

PROMPT_TOKENS = (16, 256)
"""Shortest and longest prompt; lengths between are drawn log-uniformly: short ones are as common as in a chat."""
NEW_TOKENS = (8, 128)
"""Fewest and most tokens generated for a prompt, drawn the same way."""
WARM_UP_SEED = -1
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many requests, and how they arrive."""

    requests: int = 200
    rate: float = 0.0
    """Requests a second, with exponential gaps between them (a Poisson process). 0: all at once."""
    concurrency: int = 0
    """At most so many at the same time; the others are held back, and count from when they are let go. 0: no limit."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, constraint in (
            ("requests", type(self.requests) is int and self.requests >= 1, "an integer of at least 1"),
            ("rate", 0 <= self.rate < math.inf, "0 (all at once) or more, and finite"),
            (
                "concurrency",
                type(self.concurrency) is int and self.concurrency >= 0,
                "an integer of 0 (no limit) or more",
            ),
            ("seed", type(self.seed) is int, "an integer"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {constraint}")


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to be counted in the goodput. At its limits it still does."""

    ttft_ms: float = 1000.0
    """Time to first token."""
    tpot_ms: float = 100.0
    """Time per output token after the first."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload."""

    arrival_s: float
    """After the load has begun."""
    prompt: tuple[int, ...]
    new: int
    """Tokens to generate: exactly so many."""


def parse_rate(rate: object) -> float:
    """A rate as typed: a number, or "inf", which is all at once as 0 is."""
    try:
        number = float(rate)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"rate={rate!r} must be a number of requests a second, or inf") from None
    return 0.0 if number == math.inf else number


def describe(load: Load, slo: Slo) -> str:
    """The load in words."""
    how = f"{load.rate:g} a second (Poisson)" if load.rate else "all at once"
    limit = f", at most {load.concurrency} at a time" if load.concurrency else ""
    goal = f"good: TTFT of {slo.ttft_ms:g} ms and TPOT of {slo.tpot_ms:g} ms at most"
    return f"{load.requests} requests, {how}{limit}, seed {load.seed}; {goal}"


def context_of(max_seq_len: int) -> int:
    """The context to serve a workload with: of the longest request, or what the model has if that is less."""
    return min(max_seq_len, PROMPT_TOKENS[1] + NEW_TOKENS[1])


def workload(load: Load, *, vocab_size: int, max_seq_len: int) -> list[Job]:
    """The requests, in order of arrival; prompts are random ids. The same for the same arguments, everywhere.

    Lengths are clipped to what max_seq_len holds.
    """
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 2: a prompt and a token")
    random = Random(f"load {load.seed}")
    arrival_s, jobs = 0.0, []
    for _ in range(load.requests):
        arrival_s += random.expovariate(load.rate) if load.rate else 0.0
        num_prompt = min(_log_uniform(random, *PROMPT_TOKENS), max_seq_len - 1)
        new = min(_log_uniform(random, *NEW_TOKENS), max_seq_len - num_prompt)
        jobs.append(Job(arrival_s, tuple(random.choices(range(vocab_size), k=num_prompt)), new))
    return jobs


def warm_up(requests: int, *, vocab_size: int, max_seq_len: int) -> list[Job]:
    """Short requests, all at once, of which no prompt occurs in the workload of a seed of 0 or more."""
    jobs = workload(Load(requests=requests, seed=WARM_UP_SEED), vocab_size=vocab_size, max_seq_len=max_seq_len)
    return [Job(0.0, job.prompt, min(job.new, WARM_UP_TOKENS)) for job in jobs]


def _log_uniform(random: Random, least: int, most: int) -> int:
    return min(most, int(math.exp(random.uniform(math.log(least), math.log(most + 1)))))


@dataclass(slots=True)
class Trace:
    """What happened to one request, in seconds after the load began."""

    start_s: float = 0.0
    """When it arrived: however late it was taken on, its time to first token counts from here."""
    chunks_s: list[float] = field(default_factory=list)
    """When something came: a token, or from a server that had several ready, several at once."""
    num_tokens: int = 0


class Recorder:
    """Notes what comes back. The load begins when it is made."""

    def __init__(self, requests: int) -> None:
        self.traces = [Trace() for _ in range(requests)]
        self._begin = perf_counter()

    def now(self) -> float:
        """Seconds since the load began."""
        return perf_counter() - self._begin

    @property
    def num_chunks(self) -> int:
        return sum(len(trace.chunks_s) for trace in self.traces)

    def start(self, index: int, at: float) -> None:
        self.traces[index].start_s = at

    def tokens(self, index: int, count: int = 1) -> None:
        """Tokens of one request have just come."""
        trace = self.traces[index]
        trace.chunks_s.append(perf_counter() - self._begin)
        trace.num_tokens += count


def summarize(jobs: Sequence[Job], traces: Sequence[Trace], slo: Slo) -> dict[str, float]:
    """The figures, under the names that `vllm bench serve` saves them by.

    As there: TTFT is the time to the first token, TPOT a request's time per token after it, ITL every single gap
    between two chunks, E2EL the time to the last token. A request of one token has no TPOT; its TTFT decides whether
    it is good.
    """
    assert len(jobs) == len(traces)
    assert all(trace.num_tokens for trace in traces), "a request without a token"
    duration = max(trace.chunks_s[-1] for trace in traces)
    ttft = [trace.chunks_s[0] - trace.start_s for trace in traces]
    e2el = [trace.chunks_s[-1] - trace.start_s for trace in traces]
    tpot = [
        (last - first) / (trace.num_tokens - 1) if trace.num_tokens > 1 else 0.0
        for trace, first, last in zip(traces, ttft, e2el, strict=True)
    ]
    itl = [late - early for trace in traces for early, late in zip(trace.chunks_s, trace.chunks_s[1:], strict=False)]
    is_good = [
        1000 * first <= slo.ttft_ms and 1000 * each <= slo.tpot_ms for first, each in zip(ttft, tpot, strict=True)
    ]
    num_input = sum(len(job.prompt) for job in jobs)
    num_output = sum(trace.num_tokens for trace in traces)
    return {
        "completed": len(jobs),
        "duration": duration,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(jobs) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "request_goodput": sum(is_good) / duration,
        "good_share": sum(is_good) / len(jobs),
        **_spread("ttft", ttft),
        **_spread("tpot", [each for each, trace in zip(tpot, traces, strict=True) if trace.num_tokens > 1]),
        **_spread("itl", itl),
        **_spread("e2el", e2el),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and p99 (interpolated) in milliseconds; 0 where there is nothing to measure, as vLLM has it."""
    values = 1000 * np.asarray(seconds or [0.0])
    return {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }


_ROWS = (
    ("Successful requests", "completed"),
    ("Benchmark duration (s)", "duration"),
    ("Total input tokens", "total_input_tokens"),
    ("Total generated tokens", "total_output_tokens"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Output token throughput (tok/s)", "output_throughput"),
    ("Total token throughput (tok/s)", "total_token_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("Share of good requests", "good_share"),
    *(
        (f"{kind} {name} (ms)", f"{kind.lower()}_{name.lower()}_ms")
        for name in ("TTFT", "TPOT", "ITL", "E2EL")
        for kind in ("Mean", "Median", "P99")
    ),
)


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as lines of text, a column for each contender."""
    head = f"{'':<34}" + "".join(f"{name:>12}" for name in columns)
    rows = (f"{label:<34}" + "".join(_cell(figures[key]) for figures in columns.values()) for label, key in _ROWS)
    return "\n".join([head, *rows])


def _cell(value: float) -> str:
    return f"{value:>12d}" if isinstance(value, int) else f"{value:>12.2f}"
