"""The engine: one model, its requests, step by step. Synchronous; knows nothing of threads, text or servers.

The leader calls `add`, `step` and `cancel`, or just `generate`; every other rank calls `follow` (or the same
`generate`, which follows where it does not lead).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from llama_tp.config import EngineConfig
from llama_tp.engine import codec
from llama_tp.engine.request import FinishReason, Request, SamplingParams, StepPlan, TokenEvent
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampler import Sampler
from llama_tp.engine.scheduler import Scheduler
from llama_tp.parallel.comm import Comm


@dataclass(frozen=True, slots=True)
class Completion:
    """What `Engine.generate` made of one prompt."""

    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None = None


class Engine:
    """The leader's view of the group; on followers only `follow` and `generate` make sense."""

    def __init__(self, runner: ModelRunner, comm: Comm, config: EngineConfig) -> None:
        self.runner = runner
        self.comm = comm
        self.config = config
        self.scheduler = Scheduler(config)
        self.sampler = Sampler()

    @property
    def is_leader(self) -> bool:
        return self.comm.is_leader

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self.scheduler)

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it can never run; nothing else is affected."""
        vocab_size = self.runner.model.args.vocab_size
        strangers = [token for token in request.prompt if not 0 <= token < vocab_size]
        if strangers:
            raise ValueError(f"token id {strangers[0]} is outside the vocabulary of {vocab_size}")
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> bool:
        """Forget a request between two steps; its pages are free at once. False if it is not there (any more)."""
        self.sampler.forget(request_id)
        return self.scheduler.cancel(request_id)

    def step(self) -> list[TokenEvent]:
        """Compute one step of whatever is to do. What it meant for each request that got a token or ended."""
        plan, sequences = self.scheduler.plan()
        if self.comm.size > 1:
            self.comm.publish(codec.encode(plan))
        logits = self.runner.execute(plan)
        if logits is None:
            return []
        events = self.scheduler.commit(self.sampler.sample(logits, sequences))
        for event in events:
            if event.finish_reason is not None:
                self.sampler.forget(event.request_id)
        return events

    def heartbeat(self) -> None:
        """Tell idle followers that the leader lives."""
        if self.comm.size > 1:
            self.comm.publish(codec.encode(StepPlan(0)))

    def release(self) -> None:
        """Let followers return from `follow`."""
        if self.comm.size > 1:
            self.comm.publish(codec.encode(StepPlan(0, stop=True)))

    def follow(self) -> None:
        """Execute the leader's plans until it releases us. PeerLost when it falls silent."""
        while not (plan := codec.decode(self.comm.publish(None))).stop:
            self.runner.execute(plan)

    def generate(self, prompts: Items[Items[int]], params: SamplingParams | Items[SamplingParams]) -> list[Completion]:
        """Continue each prompt of token ids. Call it on every rank; only the leader gets completions, others [].

        Prompts of any lengths run together, without padding. ValueError names the first prompt that can never run.
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
        completions: dict[str, Completion] = {}
        token_ids: dict[str, list[int]] = {}
        for index, (prompt, one) in enumerate(zip(prompts, every, strict=True)):
            try:
                self.add(Request(str(index), tuple(prompt), one))
            except ValueError as error:
                for request_id in token_ids:
                    self.cancel(request_id)
                raise ValueError(f"prompts[{index}]: {error}") from None
            token_ids[str(index)] = []
        while self.num_requests:
            for event in self.step():
                ids = token_ids[event.request_id]
                if event.token_id is not None:
                    ids.append(event.token_id)
                if event.finish_reason is not None:
                    completions[event.request_id] = Completion(ids, event.finish_reason, event.error)
        return [completions[request_id] for request_id in token_ids]
