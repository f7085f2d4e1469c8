"""Who computes what in the next step. Pure policy: no torch, no clock, no randomness.

One rule serves prefill, chunked prefill and decode: a step gives every scheduled sequence a number of its
uncomputed tokens, under a budget of tokens per step. Decodes come first, then prompts, first come first served.
A sequence that gets no page makes the youngest one give its pages up and start over later; none ever fails. A prompt
that begins like an earlier one, or like the conversation so far, shares its pages.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as Items

from llama_tp.config import EngineConfig
from llama_tp.engine.block_manager import BlockManager
from llama_tp.engine.request import Chunk, FinishReason, Request, Sequence, StepPlan, TokenEvent


class Scheduler:
    """Requests in, a StepPlan per step, sampled tokens back in, TokenEvents out."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_pages, config.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._by_id: dict[str, Sequence] = {}
        self._free_rows = list(range(config.max_batch_size))  # a heap: the lowest row first
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """Tokens of all sequences that were admitted, again after each preemption."""
        self.num_prefix_hits = 0
        """How many of them were found in the cache."""
        self._step = 0
        self._sampled: list[Sequence] = []
        self._page_updates: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._by_id)

    def request_ids(self) -> list[str]:
        """Of the requests that have not ended, in order of arrival."""
        return list(self._by_id)

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it can never run."""
        total = len(request.prompt) + request.params.max_new_tokens
        if request.id in self._by_id:
            raise ValueError(f"request id {request.id!r} is already in use")
        if not request.prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if total > self.config.max_seq_len:
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens + max_new_tokens={request.params.max_new_tokens} "
                f"exceeds max_seq_len={self.config.max_seq_len}"
            )
        if self._num_pages(total) > self.config.num_pages:
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens + max_new_tokens={request.params.max_new_tokens} exceeds "
                f"the whole KV cache of {self.config.num_pages * self.config.page_size} tokens"
            )
        sequence = Sequence(request, list(request.prompt))
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free what it holds, now. False if there is none of that id."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)
        return True

    def plan(self) -> tuple[StepPlan, list[Sequence]]:
        """The next step, and the sequences whose sampled tokens `commit` wants, in the order of the logits' rows."""
        self._step += 1
        shares: list[tuple[Sequence, Chunk]] = []
        num_decodes = sum(sequence.num_uncomputed == 1 for sequence in self.running)
        budget = self.config.max_batched_tokens - num_decodes
        for sequence in list(self.running):  # by arrival: only a sequence that has no share yet can be preempted
            if sequence.row < 0:
                continue
            if sequence.num_uncomputed == 1:
                self._give(sequence, 1, shares)
            else:
                budget -= self._give(sequence, budget, shares)
        while budget > 0 and (admitted := self._admit()):
            budget -= self._give(admitted, budget, shares)
        shares.sort(key=lambda share: len(share[1].tokens) > 1)
        self._sampled = [sequence for sequence, chunk in shares if chunk.sample]
        updates, self._page_updates = tuple(self._page_updates), []
        return StepPlan(self._step, tuple(chunk for _, chunk in shares), updates), self._sampled

    def commit(self, token_ids: Items[int | None]) -> list[TokenEvent]:
        """Take what was sampled for the planned sequences; None: their logits were not finite.

        Sequences that were cancelled since the plan are passed over.
        """
        assert len(token_ids) == len(self._sampled)
        events = []
        for sequence, token_id in zip(self._sampled, token_ids, strict=True):
            if self._by_id.get(sequence.request.id) is sequence:
                events.append(self._advance(sequence, token_id))
        self._sampled = []
        return events

    def _advance(self, sequence: Sequence, token_id: int | None) -> TokenEvent:
        request = sequence.request
        if token_id is None:
            self.cancel(request.id)
            return TokenEvent(request.id, None, FinishReason.ERROR, "nan_logits")
        if self.config.prefix_cache:
            self._register(sequence)
        if token_id in request.params.stop_ids:
            self.cancel(request.id)
            return TokenEvent(request.id, None, FinishReason.STOP)
        sequence.tokens.append(token_id)
        if sequence.num_generated < request.params.max_new_tokens:
            return TokenEvent(request.id, token_id)
        self.cancel(request.id)
        return TokenEvent(request.id, token_id, FinishReason.LENGTH)

    def _admit(self) -> Sequence | None:
        """Let the next in line run, if there is a row and there are pages for all it knows so far, so that it is not
        evicted at once. What the cache holds of its beginning it need not compute."""
        if not self.waiting or not self._free_rows:
            return None
        sequence = self.waiting[0]
        shared = self.blocks.match(sequence.tokens) if self.config.prefix_cache else []
        if self._num_pages(len(sequence.tokens)) - len(shared) > self.blocks.num_free_after(shared):
            return None
        self.waiting.popleft()
        sequence.row = heapq.heappop(self._free_rows)
        self.running.append(sequence)
        self.blocks.share(shared)
        self._page_updates += [(sequence.row, index, page) for index, page in enumerate(shared)]
        sequence.pages = shared
        sequence.num_computed = len(shared) * self.config.page_size
        sequence.num_registered = len(shared)
        self.num_prompt_tokens += len(sequence.tokens)
        self.num_prefix_hits += sequence.num_computed
        return sequence

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _give(self, sequence: Sequence, budget: int, shares: list[tuple[Sequence, Chunk]]) -> int:
        """Add the sequence's share to the step. The number of tokens it takes: 0 if it must wait."""
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + budget)
        if end == start or not self._reserve(sequence, end):
            return 0
        sequence.num_computed = end
        chunk = Chunk(sequence.row, start, tuple(sequence.tokens[start:end]), sample=end == len(sequence.tokens))
        shares.append((sequence, chunk))
        return end - start

    def _register(self, sequence: Sequence) -> None:
        """Let others find the full pages of a sequence, now that a sampled token has shown them to be finite."""
        size = self.config.page_size
        for index in range(sequence.num_registered, sequence.num_computed // size):
            self.blocks.register(sequence.pages, index, sequence.tokens[index * size : (index + 1) * size])
        sequence.num_registered = sequence.num_computed // size

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence pages for its first num_tokens tokens, if need be at the cost of younger ones."""
        home = sequence.row * self.config.pages_per_sequence
        while len(sequence.pages) < self._num_pages(num_tokens):
            index = len(sequence.pages)
            page = self.blocks.allocate(sequence.pages[-1] + 1 if sequence.pages else home)
            if page is None:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
                continue
            sequence.pages.append(page)
            self._page_updates.append((sequence.row, index, page))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, to be computed again from its first token."""
        self.num_preemptions += 1
        self._evict(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)

    def _evict(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        sequence.pages = []
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = -1
        self.running.remove(sequence)
