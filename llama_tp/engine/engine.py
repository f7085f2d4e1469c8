"""The engine: computes requests to one model, step by step. Synchronous; knows nothing of threads, text or servers.

The leader calls `add`, `step` and `cancel`, or just `generate`; every other rank calls `follow` (or `generate`, which
calls it there).
"""

from __future__ import annotations

import operator
import zlib
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from time import monotonic

from torch import Tensor

from llama_tp.config import EngineConfig
from llama_tp.engine import codec
from llama_tp.engine.request import FinishReason, Logprobs, Request, TokenEvent
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampler import Sampler
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import QueueFull, Scheduler
from llama_tp.engine.scorer import score
from llama_tp.engine.stats import STEP_BOUNDS, EngineStats, Histogram
from llama_tp.engine.step import StepPlan
from llama_tp.engine.timing import Timing
from llama_tp.parallel.comm import Comm

DIGEST_EVERY = 64
"""Steps between comparisons of what the ranks have executed."""


class GroupDiverged(RuntimeError):
    """The ranks have not executed the same plans: their caches differ, and no further token can be trusted."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the outputs that `Engine.generate` made from a prompt."""

    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None = None
    logprobs: list[Logprobs] | None = None
    """One per token, if requested."""
    prompt_logprobs: list[Logprobs] | None = None
    """Those of the prompt's tokens from the second on, if requested."""


class Engine:
    """The leader's view of the group; on followers only `follow` and `generate` make sense."""

    def __init__(self, runner: ModelRunner, comm: Comm, config: EngineConfig, *, quantization: Items[str] = ()) -> None:
        """quantization: names of the formats of quantized layers, for display."""
        self.runner = runner
        self.comm = comm
        self.config = config
        self.scheduler = Scheduler(config)
        self.sampler = Sampler()
        self._digest = 0  # of all plans that this rank has executed
        self.quantization = tuple(quantization)
        self._step_seconds = Histogram(STEP_BOUNDS)
        self._timing = Timing()
        self._tokens_out = 0

    @property
    def is_leader(self) -> bool:
        return self.comm.is_leader

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self.scheduler)

    def check(self, request: Request) -> None:
        """ValueError if a request can never run."""
        self._check_vocabulary(request)
        self.scheduler.check(request)

    def add(self, request: Request, arrival: float | None = None) -> None:
        """Queue a request. ValueError if it can never run, QueueFull if too many wait; nothing else is affected.

        arrival: when its queue time began, by time.monotonic(); default: now.
        """
        self._check_vocabulary(request)
        self.scheduler.add(request)
        self.sampler.begin(request)
        self._timing.arrived(request.id, monotonic() if arrival is None else arrival)

    def add_all(self, requests: Items[Request], arrival: float) -> None:
        """Queue all of the requests, or, if one can never run or there is no room for all, none of them: then as
        `add`."""
        if len(requests) > 1:
            for request in requests:
                self.check(request)
            if not self.scheduler.can_queue(*requests):
                raise QueueFull(f"{len(requests)} requests do not all fit into the waiting queue; try again later")
        for request in requests:
            self.add(request, arrival)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request, or one of its outputs, between two steps; its pages are freed immediately. False if it is
        not there (any more)."""
        was_there = self.scheduler.cancel(request_id, index)
        if request_id not in self.scheduler:
            self.sampler.forget(request_id)
            self._timing.left(request_id)
        return was_there

    def step(self) -> list[TokenEvent]:
        """Compute one step. Returns an event for each output that ended, and for each token, which may be several of an
        output, in their order."""
        start = monotonic()
        plan, _ = self.scheduler.plan()
        self._timing.admitted(self.scheduler.admitted, start)
        logits = self._execute(plan)
        events = []
        if logits is not None:
            if self.scheduler.scored:
                self.scheduler.commit_scores(score(logits, self.scheduler.scored))
            while self.scheduler.sampled:  # a second time only where a draft is right
                events += self._sample(logits)
        if plan.chunks:
            self._step_seconds.add(monotonic() - start)
        return events

    def _sample(self, logits: Tensor) -> list[TokenEvent]:
        """Sample one token of each sequence that the scheduler expects one of."""
        sequences, rows = self.scheduler.sampled, self.scheduler.sampled_rows
        events = self.scheduler.commit(*self.sampler.sample(logits if rows is None else logits[rows], sequences))
        for event in events:
            self._tokens_out += event.token_id is not None
            if event.error == "nan_logits":
                event.error = self._why_no_token(event)
            if event.finish_reason is not None and event.request_id not in self.scheduler:
                self.sampler.forget(event.request_id)
        got_tokens = [one for one, event in zip(sequences, events, strict=False) if event.token_id is not None]
        self._timing.sampled(got_tokens, monotonic())
        return events

    def _why_no_token(self, event: TokenEvent) -> str:
        """The error of an output that has no token."""
        output = event.request_id, event.index
        if self.sampler.has_no_mask(*output):
            return "grammar_too_complex"
        return "no_token_allowed" if self.sampler.has_ruled_out_all(*output) else "nan_logits"

    def heartbeat(self) -> None:
        """Signal to idle followers that the leader is alive, and which table rows are free."""
        assert not self.num_requests, "a step is due"
        self._execute(self.scheduler.plan()[0])

    def release(self) -> None:
        """Let followers return from `follow`."""
        if self.comm.size > 1:
            self.comm.publish(codec.encode(StepPlan(0, stop=True)))

    def follow(self) -> None:
        """Execute the leader's plans until it releases us. PeerLost if it falls silent, GroupDiverged if this rank has
        not executed the same plans."""
        while True:
            message = self.comm.publish(None)
            plan = codec.decode(message)
            if plan.stop:
                return
            if plan.digest not in (None, self._digest):
                raise GroupDiverged(
                    f"rank {self.comm.rank}: before step {plan.step} the leader's plans had the digest "
                    f"{plan.digest:08x}, those of this rank {self._digest:08x}"
                )
            self._digest = zlib.crc32(message, self._digest)
            self.runner.execute(plan)

    def stats(self) -> EngineStats:
        """Current statistics. May be called from any thread, at any time: it only reads, and takes no lock."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            pages_used=scheduler.blocks.num_used,
            pages_total=self.config.num_pages,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            prefix_hit_tokens=scheduler.num_prefix_hits,
            tokens_out=self._tokens_out,
            drafted_tokens=scheduler.speculation.num_drafted,
            accepted_tokens=scheduler.speculation.num_accepted,
            step_seconds=self._step_seconds.snapshot(),
            queue_seconds=self._timing.queue.snapshot(),
            inter_token_seconds=self._timing.inter_token.snapshot(),
        )

    def _check_vocabulary(self, request: Request) -> None:
        """ValueError for an id outside the vocabulary: it would index another sequence's logits."""
        vocab_size = self.runner.model.args.vocab_size
        for name, tokens in (
            ("token id", request.prompt),
            ("logit_bias: token id", request.params.logit_bias),
            ("stop_ids: token id", request.params.stop_ids),
            ("allowed_ids: token id", request.params.allowed_ids or ()),
            ("bad_words: token id", [token for word in request.params.bad_words for token in word]),
        ):
            are_ints = {int, bool}.issuperset(map(type, tokens))  # fast: a prompt may have 100,000 tokens
            if not are_ints and (others := [token for token in tokens if not isinstance(token, int)]):
                raise ValueError(f"{name} {others[0]!r} must be an integer")
            if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
                outside = next(token for token in tokens if not 0 <= token < vocab_size)
                raise ValueError(f"{name} {outside} is outside the vocabulary of {vocab_size}")

    def _execute(self, plan: StepPlan) -> Tensor | None:
        """Execute a plan on every rank."""
        if self.comm.size > 1:
            if plan.step % DIGEST_EVERY == 0:
                plan = replace(plan, digest=self._digest)
            message = codec.encode(plan)
            self._digest = zlib.crc32(message, self._digest)
            self.comm.publish(message)
        return self.runner.execute(plan)

    def generate(self, prompts: Items[Items[int]], params: SamplingParams | Items[SamplingParams]) -> list[Completion]:
        """Continue each prompt of token ids. Call it on every rank; only the leader gets completions, others [].

        The n completions of a prompt are adjacent. Any number of prompts of any lengths are batched, without padding.
        ValueError names the first prompt that can never run; RuntimeError if added requests have not ended.
        """
        if not self.is_leader:
            self.follow()
            return []
        try:
            return self._lead(prompts, params)
        finally:
            self.release()

    def _lead(self, prompts: Items[Items[int]], params: SamplingParams | Items[SamplingParams]) -> list[Completion]:
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(prompts):
            raise ValueError(f"{len(every)} params for {len(prompts)} prompts; pass one for each, or one for all")
        if self.num_requests:
            raise RuntimeError(f"{self.num_requests} requests were added and have not ended; step until they have")
        requests = []
        for index, (prompt, one) in enumerate(zip(prompts, every, strict=True)):
            request = Request(str(index), _ids(prompt), one)
            try:
                self.check(request)
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
            requests.append(request)
        try:
            return self._complete(requests)
        finally:
            for request_id in self.scheduler.request_ids():  # if interrupted
                self.cancel(request_id)

    def _complete(self, requests: list[Request]) -> list[Completion]:
        events: dict[tuple[str, int], list[TokenEvent]] = {
            (request.id, index): [] for request in requests for index in range(request.params.n)
        }
        queue = deque(requests)
        while queue or self.num_requests:
            while queue and self.scheduler.can_queue(queue[0]):
                self.scheduler.add(queue.popleft())  # all were checked before the first was added
            for event in self.step():
                events[event.request_id, event.index].append(event)
        scores = {
            event.request_id: event.prompt_logprobs
            for one in events.values()
            for event in one
            if event.prompt_logprobs is not None
        }
        return [_completion(one, scores.get(request_id)) for (request_id, _), one in events.items()]


def _ids(prompt: Items[int]) -> tuple[int, ...]:
    """Other libraries' integers as Python's. Non-integers are left for the check to name."""
    try:
        return tuple(map(operator.index, prompt))
    except TypeError:
        return tuple(prompt)


def _completion(events: list[TokenEvent], prompt_logprobs: list[Logprobs] | None) -> Completion:
    tokens = [event for event in events if event.token_id is not None]
    logprobs = [event.logprobs for event in tokens if event.logprobs is not None]
    last = events[-1]
    assert last.finish_reason is not None
    ids = [event.token_id for event in tokens if event.token_id is not None]
    return Completion(
        ids,
        last.finish_reason,
        last.error,
        logprobs if len(logprobs) == len(ids) > 0 else None,
        prompt_logprobs,
    )
