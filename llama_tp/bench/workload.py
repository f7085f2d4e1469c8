"""An open-loop load and its metrics, the same for the offline engine and a server.

`workload` generates requests with arrival times, `Recorder` records when tokens come back, `summarize` computes the
metrics of `vllm bench serve`, under the same names. Knows nothing about the engine, HTTP or torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from time import perf_counter

import numpy as np

PROMPT_TOKENS = (16, 256)
"""Minimum and maximum prompt length; lengths are log-uniform, so that short ones are as common as in chats."""
NEW_TOKENS = (8, 128)
"""Minimum and maximum number of generated tokens, also log-uniform."""
WARM_UP_SEED = -1
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many requests, and how they arrive."""

    requests: int = 200
    rate: float = 0.0
    """Requests per second, as a Poisson process. 0: all at once."""
    concurrency: int = 0
    """Maximum number of concurrent requests; others are held back and timed from when they are sent. 0: no limit."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, constraint in (
            ("requests", type(self.requests) is int and self.requests >= 1, "an integer of at least 1"),
            ("rate", 0 <= self.rate < math.inf, "at least 0 (all at once) and finite"),
            (
                "concurrency",
                type(self.concurrency) is int and self.concurrency >= 0,
                "an integer of at least 0 (no limit)",
            ),
            ("seed", type(self.seed) is int, "an integer"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {constraint}")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits, inclusive, that a request must meet to count in the goodput."""

    ttft_ms: float = 1000.0
    """Time to first token."""
    tpot_ms: float = 100.0
    """Time per output token after the first."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload."""

    arrival_s: float
    """Seconds after the start of the load."""
    prompt: tuple[int, ...]
    new: int
    """Exact number of tokens to generate."""


def parse_rate(rate: object) -> float:
    """Parse a rate: a number, or "inf", which means all at once, like 0."""
    try:
        number = float(rate)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"rate={rate!r} must be a number of requests per second, or inf") from None
    return 0.0 if number == math.inf else number


def describe(load: Load, slo: Slo) -> str:
    """The load as text."""
    how = f"{load.rate:g} per second (Poisson)" if load.rate else "all at once"
    limit = f", concurrency {load.concurrency}" if load.concurrency else ""
    goal = f"SLO: TTFT up to {slo.ttft_ms:g} ms, TPOT up to {slo.tpot_ms:g} ms"
    return f"{load.requests} requests, {how}{limit}, seed {load.seed}; {goal}"


def context_of(max_seq_len: int) -> int:
    """The context for serving a workload: that of the longest request, or the model's if less."""
    return min(max_seq_len, PROMPT_TOKENS[1] + NEW_TOKENS[1])


def workload(load: Load, *, vocab_size: int, max_seq_len: int) -> list[Job]:
    """The requests, in order of arrival; prompts are random ids. Deterministic for the same arguments.

    Lengths are clipped to fit in max_seq_len.
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


def with_other_prompts(jobs: Sequence[Job], variant: int, *, vocab_size: int) -> list[Job]:
    """The same work, with prompts that have nothing in common with those of another variant. 0: the jobs themselves."""
    return [replace(job, prompt=tuple((token + variant) % vocab_size for token in job.prompt)) for job in jobs]


def warm_up(requests: int, *, vocab_size: int, max_seq_len: int) -> list[Job]:
    """Short requests, all at once, with prompts that do not occur in workloads with a seed of 0 or more."""
    jobs = workload(Load(requests=requests, seed=WARM_UP_SEED), vocab_size=vocab_size, max_seq_len=max_seq_len)
    return [Job(0.0, job.prompt, min(job.new, WARM_UP_TOKENS)) for job in jobs]


def _log_uniform(random: Random, least: int, most: int) -> int:
    return min(most, int(math.exp(random.uniform(math.log(least), math.log(most + 1)))))


@dataclass(slots=True)
class Trace:
    """The timeline of one request, in seconds after the start of the load."""

    start_s: float = 0.0
    """Arrival. TTFT counts from here, however late the request was accepted."""
    chunks_s: list[float] = field(default_factory=list)
    """When each chunk came: a token, or several that a server had ready."""
    num_tokens: int = 0


class Recorder:
    """Records when tokens come back. The load starts when this is created."""

    def __init__(self, requests: int) -> None:
        self.traces = [Trace() for _ in range(requests)]
        self._begin = perf_counter()

    def now(self) -> float:
        """Seconds since the start of the load."""
        return perf_counter() - self._begin

    @property
    def num_chunks(self) -> int:
        return sum(len(trace.chunks_s) for trace in self.traces)

    def start(self, index: int, at: float) -> None:
        self.traces[index].start_s = at

    def tokens(self, index: int, count: int = 1) -> None:
        """Record tokens that have just come for one request."""
        trace = self.traces[index]
        trace.chunks_s.append(perf_counter() - self._begin)
        trace.num_tokens += count

    def complete(self, index: int, num_tokens: int) -> None:
        """Record how many tokens an answer has in all, which can differ from what could be counted as it came."""
        self.traces[index].num_tokens = num_tokens


def summarize(jobs: Sequence[Job], traces: Sequence[Trace], slo: Slo) -> dict[str, float]:
    """The metrics, named and defined as in the results of `vllm bench serve`.

    TTFT is the time to the first token, TPOT a request's time per token after it, ITL every gap between two chunks,
    E2EL the time to the last token. A request with one token has no TPOT; only its TTFT decides whether it is good.
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
    """Mean, median and p99 (interpolated) in milliseconds; 0 if there are no samples, as in vLLM."""
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
    """The metrics as text, one column per contender."""
    head = f"{'':<34}" + "".join(f"{name:>12}" for name in columns)
    rows = (f"{label:<34}" + "".join(_cell(figures[key]) for figures in columns.values()) for label, key in _ROWS)
    return "\n".join([head, *rows])


def _cell(value: float) -> str:
    return f"{value:>12d}" if isinstance(value, int) else f"{value:>12.2f}"
