"""How a request is sampled. Every parameter is declared here once, with its range and its meaning.

A parameter made by `knob` is a field of every API dialect and has a default in the server's configuration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Interval:
    """A range of numbers."""

    low: float
    high: float
    excludes_low: bool = False
    excludes_high: bool = False

    @classmethod
    def parse(cls, text: str) -> Interval:
        """From the usual notation: (0, 1] excludes 0 and includes 1."""
        match = re.fullmatch(r"([\[(])(.*), (.*)([\])])", text)
        assert match is not None, text
        return cls(float(match[2]), float(match[3]), match[1] == "(", match[4] == ")")

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.excludes_low else self.low <= value
        return above and (value < self.high if self.excludes_high else value <= self.high)

    def __str__(self) -> str:
        brackets = "(" if self.excludes_low else "[", ")" if self.excludes_high else "]"
        return f"{brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"


def knob(default: float, allowed: str, meaning: str, *, api: str | None = None) -> Any:
    """A number that both API requests and the server's configuration can set.

    `allowed`: the interval that the sampler supports. `api`: the narrower one that the APIs accept, if their users
    expect one. `meaning`: for the documentation of the APIs.
    """
    metadata = {"allowed": Interval.parse(allowed), "api": Interval.parse(api or allowed), "meaning": meaning}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The defaults are plain sampling from the model's distribution.

    Applied in this order: the three penalties, logit_bias, allowed_ids, bad_words, min_new_tokens, the request's
    grammar, temperature, top_k, top_p, min_p, one draw.
    """

    max_new_tokens: int = 128
    """0 is possible with prompt_logprobs: the request then ends once its prompt is scored."""
    min_new_tokens: int = 0
    """No stop id is sampled before the output has this many tokens."""
    temperature: float = knob(
        1.0,
        "[0, inf)",
        "0 is greedy: the most probable token, without a random draw. So is anything below 1e-5.",
        api="[0, 2]",
    )
    top_p: float = knob(
        1.0,
        "(0, 1]",
        "Sample from the smallest set of tokens whose probability reaches this (nucleus, arXiv:1904.09751).",
    )
    top_k: int = knob(0, "[0, inf)", "Sample from the k most probable tokens. 0: all.", api=f"[0, {2**31 - 1}]")
    min_p: float = knob(
        0.0, "[0, 1]", "Drop tokens less probable than this times the most probable one (arXiv:2407.01082)."
    )
    repetition_penalty: float = knob(
        1.0,
        "[0.01, 100]",
        "Divides the positive logits of tokens in prompt or output, multiplies the negative ones (arXiv:1909.05858).",
        api="[0.01, 10]",
    )
    presence_penalty: float = knob(
        0.0, "[-1000, 1000]", "Subtracted once from the logit of every token in the output.", api="[-2, 2]"
    )
    frequency_penalty: float = knob(
        0.0,
        "[-1000, 1000]",
        "Subtracted from the logit of every token in the output, times its number of occurrences.",
        api="[-2, 2]",
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    allowed_ids: frozenset[int] | None = None
    """If set, no other token is sampled."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Tokens that the output must not have in a row: the last of them is not sampled after the others."""
    seed: int | None = None
    """Seed of the request's own generator; None: a random one. Output i of n uses seed + i."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the sequence; the id itself is not part of the output."""
    n: int = 1
    """Number of outputs. The prompt is computed once."""
    logprobs: int | None = None
    """Report log probabilities of each token and of this many most probable ones, in the model's own distribution:
    before any of the above is applied."""

    prompt_logprobs: int | None = None
    """Report the same of each prompt token but the first. The prompt is then computed in full, even if it is in the
    prefix cache."""
    edits_logits: bool = field(init=False, repr=False, compare=False)
    """Whether any of these parameters changes logits before temperature and what follows it."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if not (type(value) is int or (name in ("seed", "logprobs", "prompt_logprobs") and value is None)):
                raise ValueError(f"{name}={value!r} must be an integer")
        for name, allowed in _ALLOWED:
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise ValueError(f"{name}={value!r} must be a number")
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be in {allowed}")
        least = "at least 1, or 0 with prompt_logprobs"
        for name, ok, constraint in (
            ("max_new_tokens", self.max_new_tokens >= (self.prompt_logprobs is None), least),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("logit_bias", all(abs(bias) <= 1000 for bias in self.logit_bias.values()), "numbers in [-1000, 1000]"),
            ("allowed_ids", self.allowed_ids is None or len(self.allowed_ids) > 0, "at least one token id"),
            ("bad_words", all(self.bad_words), "sequences of at least one token id"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63)"),
            ("n", self.n >= 1, "at least 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {constraint}")
        edits = self.has_penalty or self.logit_bias or self.allowed_ids or self.bad_words or self.min_new_tokens
        object.__setattr__(self, "edits_logits", bool(edits))

    def but(self, **changes: Any) -> SamplingParams:
        """The same parameters with some changed."""
        return replace(self, **changes)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalty(self) -> bool:
        """Whether a sequence's tokens so far affect its next one."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter of `SamplingParams` that APIs and configuration share."""

    name: str
    kind: type[int] | type[float]
    default: float
    api: Interval
    meaning: str


KNOBS = tuple(
    Knob(
        one.name,
        {"int": int, "float": float}[str(one.type)],
        cast(float, one.default),
        one.metadata["api"],
        one.metadata["meaning"],
    )
    for one in dataclasses.fields(SamplingParams)
    if "api" in one.metadata
)
_ALLOWED = tuple((one.name, one.metadata["allowed"]) for one in dataclasses.fields(SamplingParams) if one.metadata)
