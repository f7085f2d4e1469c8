"""What goes into the engine and what comes out of it: requests and events. Ids only: no text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llama_tp.engine.sampling_params import SamplingParams


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
