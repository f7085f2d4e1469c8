"""The engine's input and output: requests and events. Ids only: no text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llama_tp.engine.grammar import TokenGrammar
from llama_tp.engine.sampling_params import SamplingParams


class FinishReason(str, Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """It sampled one of its stop ids, or the text layer found a stop string."""
    LENGTH = "length"
    """It reached max_new_tokens, which may be 0."""
    TIMEOUT = "timeout"
    """It reached its timeout; its output so far is kept."""
    CANCELLED = "cancelled"
    """Nobody is waiting for it any more."""
    ERROR = "error"
    """Its own logits were not finite, or its parameters leave no token to sample."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    grammar: TokenGrammar | None = None
    """What its outputs must match, stop ids included."""
    timeout_s: float | None = None
    """Seconds from arrival at the engine, queueing included, after which `EngineLoop` ends it; its output is kept."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of a token and of the most probable ones, in the model's own distribution. Natural
    logarithms."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), most probable first."""
    rank: int = 0
    """The token's place among all, 1 for the most probable. Of a prompt's tokens only; 0 for sampled ones."""


@dataclass(slots=True)
class TokenEvent:
    """One step's effect on one output: a new token, its end, or both.

    Not frozen, because the leader creates one per sequence and step, and that would take four times as long.
    """

    request_id: str
    token_id: int | None = None
    """None when the step ended the request without adding a token to its output (stop id, cancel, error), or
    generated none (max_new_tokens=0)."""
    finish_reason: FinishReason | None = None
    """None until the output ends."""
    error: str | None = None
    """With finish_reason "error": a short code such as nan_logits."""
    index: int = 0
    """Which of the request's n outputs this belongs to."""
    logprobs: Logprobs | None = None
    """Those of token_id, if requested."""
    num_cached: int = field(default=0, compare=False)
    """How many of the prompt's tokens were found in the prefix cache; in the first event of output 0 only. Not what an
    event means, so not compared."""
    stop_id: int | None = None
    """The stop id that ended the output, if one did."""
    prompt_logprobs: list[Logprobs] | None = None
    """Those of the prompt's tokens from the second on, if requested: in the first event of the output that computed the
    prompt, usually output 0."""
