"""The types that travel between the edges, the scheduler and the ranks. Ids only: no text, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple


class FinishReason(str, Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """It sampled one of its stop ids, or the text layer found a stop string."""
    LENGTH = "length"
    """It has max_new_tokens tokens."""
    TIMEOUT = "timeout"
    """Its time was up; what was generated until then stands."""
    CANCELLED = "cancelled"
    """Nobody waits for it any more."""
    ERROR = "error"
    """Its own logits were not finite, or what it asks for leaves no token to sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The defaults are plain sampling from the model's distribution.

    They act in this order: the three penalties, logit_bias, min_new_tokens, temperature, top_k, top_p, min_p, one draw.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """Until there are so many, no stop id is sampled."""
    temperature: float = 1.0
    """0 is greedy: the most probable token, no random number is drawn. So is anything below 1e-5."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this (nucleus, arXiv:1904.09751)."""
    top_k: int = 0
    """Sample from the k most probable tokens. 0: all."""
    min_p: float = 0.0
    """Drop tokens less probable than this times the most probable one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt or output, multiplies the negative ones (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token in the output, once."""
    frequency_penalty: float = 0.0
    """Taken off the logit of every token in the output, as often as it is there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Makes the request's own generator reproducible. None: a fresh one. Output i of n is drawn with seed + i."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the sequence; the id itself is not part of the output."""
    n: int = 1
    """How many outputs to make of one prompt, which is computed once."""
    logprobs: int | None = None
    """Report each token's log probability, and those of so many most probable ones, in the model's own distribution:
    before anything above changes it."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n", "seed", "logprobs"):
            value = getattr(self, name)
            if not (type(value) is int or (name in ("seed", "logprobs") and value is None)):
                raise ValueError(f"{name}={value!r} must be an integer")
        for name in _NUMBERS:
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        for name, ok, constraint in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]"),
            ("presence_penalty", abs(self.presence_penalty) <= 1000, "in [-1000, 1000]"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 1000, "in [-1000, 1000]"),
            ("logit_bias", all(abs(bias) <= 1000 for bias in self.logit_bias.values()), "of numbers in [-1000, 1000]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63)"),
            ("n", self.n >= 1, "at least 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {constraint}")

    def but(self, **changes: Any) -> SamplingParams:
        """The same parameters with some changed."""
        return replace(self, **changes)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalty(self) -> bool:
        """Whether what a sequence holds already changes what it gets next."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    timeout_s: float | None = None
    """Seconds from its arrival at the engine, waiting included, after which `EngineLoop` ends it with what it has."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How probable a sampled token was, and what else was, in the model's own distribution. Natural logarithms."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), the most probable first."""


@dataclass(slots=True)
class TokenEvent:
    """What one step meant for one request: a new token, or its end, or both.

    Not frozen, because the leader makes one for each sequence and step, and that would take four times as long.
    """

    request_id: str
    token_id: int | None = None
    """None when the step ended the request without adding a token to its output (stop id, cancel, error)."""
    finish_reason: FinishReason | None = None
    """None while the request goes on."""
    error: str | None = None
    """With finish_reason "error": a short code such as nan_logits."""
    index: int = 0
    """Which of the request's n outputs this is about."""
    logprobs: Logprobs | None = None
    """Of token_id, where the request asked for them."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of a request on its way: the one mutable thing. Only the scheduler changes it."""

    request: Request
    tokens: list[int]
    """Prompt, then everything sampled."""
    index: int = 0
    """Which of the request's n outputs this is."""
    forks: list[Sequence] = field(default_factory=list)
    """The request's other outputs, while they wait for this one to have computed their prompt."""
    row: int = -1
    """Its row in every rank's page table; -1 while it holds no cache."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    pages: list[int] = field(default_factory=list)
    reservation: range = range(0)
    """Pages that are free for it to grow into."""
    num_shared: int = 0
    """Pages, from the first, that it found in the cache."""
    num_registered: int = 0
    """Pages, from the first, that prompts which begin alike can find."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens to feed before the next one can be sampled: the prompt's rest in prefill, 1 in decode."""
        return len(self.tokens) - self.num_computed


class Chunk(NamedTuple):
    """One sequence's share of a step: compute `tokens` at positions start, start + 1, ...

    A tuple, because every rank makes one for each sequence and step, and a frozen dataclass takes three times as long.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    """Whether logits of the last token are wanted."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that a rank needs to execute one step. Decided by the leader, the same on every rank."""

    step: int
    """Number of the step, counted from 1; 0 in plans that compute nothing."""
    chunks: tuple[Chunk, ...] = ()
    page_updates: tuple[tuple[int, int, int], ...] = ()
    """(row, index, page): entries of the page table that changed since the last plan, after `freed`."""
    freed: tuple[int, ...] = ()
    """Rows of the page table that hold no sequence any more."""
    digest: int | None = None
    """The leader's digest of all plans before this one. None: no ranks are compared now."""
    stop: bool = False
    """The leader releases its followers."""
