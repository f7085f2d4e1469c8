"""One output of a request while it is generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_tp.engine.prompt_lookup import PromptLookup
from llama_tp.engine.request import Logprobs, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of a request in progress: the one mutable type. Only the scheduler changes it (and `Timing`)."""

    request: Request
    tokens: list[int]
    """Prompt, then everything sampled."""
    index: int = 0
    """Which of the request's n outputs this is."""
    forks: list[Sequence] = field(default_factory=list)
    """The request's other outputs, while they wait for this one to compute their prompt."""
    row: int = -1
    """Its row in every rank's page table; -1 while it holds no cache."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    pages: list[int] = field(default_factory=list)
    reservation: range = range(0)
    """Free pages set aside for its growth."""
    num_shared: int = 0
    """Leading pages that it found in the cache."""
    num_registered: int = 0
    """Leading pages that prompts with a common prefix can find."""
    scores: list[Logprobs] | None = None
    """Log probabilities of the prompt's tokens, from the second on, as far as they are computed. None: not requested,
    or computed by another output, or already reported."""
    draft: tuple[int, ...] = ()
    """Its probable next tokens, as far as the current step computes them and has not yet sampled others."""
    lookup: PromptLookup | None = None
    """Predicts them; None: not needed so far."""
    sampled_at: float | None = None
    """When its newest token was sampled, as measured by the engine's `Timing`."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens to feed before the next one can be sampled: the rest of the prompt in prefill, 1 in decode."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens in a row that a step scores."""

    sequence: Sequence
    row: int
    """Index of the logits that predict the first of them; the others follow."""
    targets: tuple[int, ...]
    """Their ids; may be empty."""
