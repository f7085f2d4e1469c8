"""What generates tokens in a benchmark: our engine, and transformers. All prompts of a run have the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from time import perf_counter
from typing import Any, Protocol

import torch

from llama_tp.engine.engine import Engine
from llama_tp.engine.grammar import TokenGrammar
from llama_tp.engine.request import Request, TokenEvent
from llama_tp.engine.sampling_params import SamplingParams

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One run. The prefill ends with the last prompt's first token and includes decodes computed alongside prompts."""

    prefill_s: float
    decode_s: float
    decoded: int
    """Tokens sampled after the prefill."""
    steps_s: tuple[float, ...] = ()
    """Each step of decode, if the contender tells."""
    first_tokens: tuple[int, ...] = ()
    """The first sequence's tokens, as far as they are known."""
    drafted: int = 0
    """Tokens predicted by speculative decoding, and how many were right."""
    accepted: int = 0


class Contender(Protocol):
    name: str

    def run(self, prompts: Prompts, new: int) -> Timing:
        """Generate `new` tokens for each prompt: the first ends the prefill, and all sequences decode the others
        together."""
        ...


def longest_sequence(
    batch: int,
    prompt: int,
    new: int,
    max_batched_tokens: int,
    *,
    speculative_tokens: int = 0,
    speculative_max_batch: int = 0,
) -> int:
    """The context that `OurEngine` needs for a run, in which the first sequences decode while others are prefilled.

    With speculative decoding, also the step that ends the prefill may give several tokens, and a sequence may be ahead
    of the slowest one.
    """
    steps = (batch - 1) * prompt // max(1, max_batched_tokens - batch) + (batch > 1)
    most = 1 + speculative_tokens
    decoded = new * (most if 1 < batch <= speculative_max_batch else 1)
    return prompt + decoded + steps * most + speculative_tokens


class OurEngine:
    """Sequences continue until all have decoded `new` tokens together, and are cancelled then: otherwise the batch
    would shrink while it is measured."""

    name = "llama_tp"

    def __init__(self, engine: Engine, name: str = name, *, grammar: TokenGrammar | None = None) -> None:
        """`grammar`: what all sequences must match; it should not end within a run."""
        self.engine = engine
        self.name = name
        self._grammar = grammar
        self._ids = count()

    def run(self, prompts: Prompts, new: int) -> Timing:
        engine = self.engine
        names = [f"bench {next(self._ids)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            params = SamplingParams(max_new_tokens=engine.config.max_seq_len - len(prompt), temperature=0)
            engine.add(Request(name, tuple(prompt), params, self._grammar))
        waiting, events = set(names), list[TokenEvent]()
        before = engine.stats()
        start = perf_counter()
        while waiting:
            found = engine.step()
            events += found
            waiting -= {event.request_id for event in found}
        times, num_before = [perf_counter()], len(events)
        left = dict.fromkeys(names, new - 1)
        while max(left.values()) > 0 and engine.num_requests:
            found = engine.step()
            times.append(perf_counter())
            events += found
            for event in found:
                left[event.request_id] -= 1
        for name in names:
            engine.cancel(name)
        after = engine.stats()
        tokens = [one.token_id for one in events if one.request_id == names[0] and one.token_id is not None]
        return Timing(
            times[0] - start,
            times[-1] - times[0],
            len(events) - num_before,
            tuple(late - early for early, late in pairwise(times)),
            tuple(tokens[:new]),
            after.drafted_tokens - before.drafted_tokens,
            after.accepted_tokens - before.accepted_tokens,
        )


class Transformers:
    """transformers' `generate`, with SDPA attention and its default dynamic cache."""

    name = "transformers"

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, prompts: Prompts, new: int) -> Timing:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.model.device)
        times = _Times([perf_counter()])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                streamer=times,
            )
        start, _, first, *later = times
        assert len(times) == 2 + new
        steps = tuple(late - early for early, late in pairwise([first, *later]))
        return Timing(first - start, sum(steps), len(prompts) * (new - 1), steps, tuple(out[0, ids.size(1) :].tolist()))


class _Times(list[float]):
    """A transformers streamer that records when it gets the prompts, and then each step's tokens."""

    def put(self, _tokens: torch.Tensor) -> None:
        self.append(perf_counter())

    def end(self) -> None:
        pass
