"""Decides what each step computes. Pure policy: no torch, no clock, no randomness.

One rule covers prefill, chunked prefill and decode: a step computes some of each scheduled sequence's uncomputed
tokens, within a budget of tokens per step. Decodes come first, then prompts, first come first served. If pages run out,
the youngest sequence is preempted and starts over later; none ever fails. Prompts with a common prefix share its pages,
as do the turns of a conversation; so do the n outputs of one request, the first of which computes the prompt for all.

A request for the log probabilities of its prompt needs the logits of all its tokens, so it shares nothing until it has
them, and a step computes at most MAX_SCORED of them.

What is left of a step's budget, and of the pages, may be used for speculative decoding (`speculation.py`).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items
from types import MappingProxyType

from llama_tp.config import EngineConfig
from llama_tp.engine.block_manager import NO_RESERVATION, BlockManager
from llama_tp.engine.request import FinishReason, Logprobs, Request, TokenEvent
from llama_tp.engine.sequence import Sequence, Span
from llama_tp.engine.speculation import Share, Speculation
from llama_tp.engine.step import Chunk, StepPlan

MAX_SCORED = 128
"""Logits per step of prompts to be scored and of drafts, besides one per sampled sequence: with a vocabulary of 128,256
they take 63 MiB."""
_NUM_RESERVED = 16
"""Pages reserved for a sequence beyond those it needs now, if it may need them."""


class QueueFull(ValueError):
    """The waiting queue is full."""


class Scheduler:
    """Requests in, a StepPlan per step, sampled tokens back in, TokenEvents out."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_pages, config.page_size, config.pages_per_sequence)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._by_id: dict[str, list[Sequence]] = {}  # those that have not ended
        self._num_sequences = 0  # in _by_id; a counter, because other threads read it
        self._free_rows = list(range(config.max_batch_size))  # a heap: the lowest row first
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """Tokens of all admitted sequences, counted again after each preemption."""
        self.num_prefix_hits = 0
        """How many of them were found in the cache."""
        self.admitted: list[Sequence] = []
        """Those that the last plan admitted."""
        self.speculation = Speculation(config)
        self._step = 0
        self.sampled: list[Sequence] = []
        """The sequences whose sampled tokens `commit` expects next. After a call of it, those whose draft is right so
        far: the step has computed their next logits, too."""
        self.sampled_rows: list[int] | None = None
        """Which of the step's logits their tokens are sampled from, in order. None: all."""
        self.scored: list[Span] = []
        """What the last plan scores."""
        self._num_scored = 0
        self._page_updates: list[tuple[int, int, int]] = []
        self._freed: list[int] = []  # rows

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        """Whether the request was added and has not ended."""
        return request_id in self._by_id

    @property
    def num_waiting(self) -> int:
        """Outputs that have not ended and hold no cache."""
        return self._num_sequences - len(self.running)

    def can_queue(self, *requests: Request) -> bool:
        """Whether all of the requests' outputs fit into the waiting queue."""
        return self.num_waiting + sum(request.params.n for request in requests) <= self.config.max_waiting

    def request_ids(self) -> list[str]:
        """Ids of the requests that have not ended, in order of arrival."""
        return list(self._by_id)

    def active_outputs(self, request_id: str) -> list[int]:
        """Which of a request's outputs have not ended."""
        return [sequence.index for sequence in self._by_id.get(request_id, ())]

    def is_current(self, request: Request) -> bool:
        """Whether this very request has not ended: its id may have been reused."""
        return any(sequence.request is request for sequence in self._by_id.get(request.id, ()))

    def check(self, request: Request) -> None:
        """ValueError if a request can never run."""
        total = len(request.prompt) + request.params.max_new_tokens
        if not request.prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if request.params.n > self.config.max_waiting:
            raise ValueError(f"n={request.params.n} exceeds max_waiting={self.config.max_waiting}")
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

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it can never run, QueueFull if too many are already waiting."""
        if request.id in self._by_id:
            raise ValueError(f"request id {request.id!r} is already in use")
        self.check(request)
        if not self.can_queue(request):
            raise QueueFull(
                f"{self.num_waiting} outputs are already waiting, and n={request.params.n} more would exceed "
                f"max_waiting={self.config.max_waiting}; try again later"
            )
        first, *forks = sequences = [Sequence(request, list(request.prompt), i) for i in range(request.params.n)]
        first.forks = forks
        first.scores = None if request.params.prompt_logprobs is None else []
        self._by_id[request.id] = sequences
        self._num_sequences += len(sequences)
        self.waiting.append(first)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request, or one of its outputs, and free its pages. False if it is not there (any more)."""
        cancelled = [one for one in self._by_id.get(request_id, ()) if index in (None, one.index)]
        for sequence in cancelled:
            self._promote_sibling(sequence)
            self._end(sequence)
        return bool(cancelled)

    def plan(self) -> tuple[StepPlan, list[Sequence]]:
        """The next step, and the sequences whose sampled tokens `commit` expects, in the order of the logits."""
        self._step += 1
        self.admitted = []
        self._num_scored = 0
        shares: list[Share] = []
        num_decodes = sum(sequence.num_uncomputed == 1 for sequence in self.running)
        budget = self.config.max_batched_tokens - num_decodes
        for sequence in list(self.running):  # oldest first: only a sequence without a share yet can be preempted
            if sequence.row < 0:
                continue
            if sequence.num_uncomputed == 1:
                self._schedule(sequence, 1, shares)
            else:
                budget -= self._schedule(sequence, budget, shares)
        while budget > 0 and (admitted := self._admit()):
            budget -= self._schedule(admitted, budget, shares)
        shares.sort(key=_attention_order)
        self.sampled = [sequence for sequence, _ in shares if not sequence.num_uncomputed]
        for sequence in self.sampled:
            if sequence.num_generated + 1 < sequence.request.params.max_new_tokens:
                self._extend(sequence, len(sequence.tokens) + 1)  # so that ranks can already lay out the next step
        if has_drafts := self._add_drafts(shares, budget):
            shares.sort(key=_attention_order)
            self.sampled = [sequence for sequence, _ in shares if not sequence.num_uncomputed]
        self.scored = _spans(shares) if self._num_scored else []
        self.sampled_rows = _sampled_rows(shares) if has_drafts or self.scored else None
        updates, self._page_updates = tuple(self._page_updates), []
        freed, self._freed = tuple(self._freed), []
        return StepPlan(self._step, tuple(chunk for _, chunk in shares), updates, freed), self.sampled

    def commit_scores(self, scores: Items[Items[Logprobs]]) -> None:
        """Take the log probabilities of the planned spans. They are reported with the output's first event."""
        assert len(scores) == len(self.scored)
        for span, logprobs in zip(self.scored, scores, strict=True):
            if span.sequence.scores is not None:
                span.sequence.scores.extend(logprobs)
        self.scored = []

    def commit(
        self, token_ids: Items[int | None], logprobs: Mapping[int, Logprobs] = MappingProxyType({})
    ) -> list[TokenEvent]:
        """Take the tokens sampled for `sampled`; None: the logits were not finite. logprobs: by index in it. To be
        called until `sampled` is empty.

        Sequences cancelled since the plan are skipped.
        """
        assert len(token_ids) == len(self.sampled)
        events, going_on, rows = [], [], []
        for index, (sequence, token_id) in enumerate(zip(self.sampled, token_ids, strict=True)):
            if sequence.row >= 0:
                events.append(self._advance(sequence, token_id, logprobs.get(index)))
                if sequence.draft and self.speculation.accept(sequence):
                    assert self.sampled_rows is not None
                    going_on.append(sequence)
                    rows.append(self.sampled_rows[index] + 1)
        self.sampled, self.sampled_rows = going_on, rows
        return events

    def _advance(self, sequence: Sequence, token_id: int | None, logprobs: Logprobs | None) -> TokenEvent:
        request, index = sequence.request, sequence.index
        if token_id is not None and (self.config.prefix_cache or sequence.forks):
            self._register(sequence)
        self._queue_forks(sequence)
        scores, sequence.scores = sequence.scores, None
        if token_id is None or (scores is not None and any(math.isnan(one.chosen) for one in scores)):
            self._end(sequence)
            return TokenEvent(request.id, None, FinishReason.ERROR, "nan_logits", index)
        num_cached = self._num_cached(sequence) if index == 0 and sequence.num_generated == 0 else 0
        max_new_tokens, reason, stop_id = request.params.max_new_tokens, None, None
        if not max_new_tokens:
            token_id, logprobs, reason = None, None, FinishReason.LENGTH
        elif token_id in request.params.stop_ids:
            token_id, logprobs, reason, stop_id = None, None, FinishReason.STOP, token_id
        else:
            sequence.tokens.append(token_id)
            if sequence.num_generated >= max_new_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            self._end(sequence)
        return TokenEvent(request.id, token_id, reason, None, index, logprobs, num_cached, stop_id, scores)

    def _num_cached(self, sequence: Sequence) -> int:
        """Tokens of the sequence that were not computed when it was admitted."""
        return sequence.num_shared * self.config.page_size

    def _queue_forks(self, sequence: Sequence) -> None:
        """Queue the request's outputs that have waited for this one."""
        forks, sequence.forks = sequence.forks, []
        self.waiting.extendleft(reversed(forks))

    def _promote_sibling(self, sequence: Sequence) -> None:
        """If other outputs wait for this one to compute the prompt, let the next of them do it instead."""
        if not sequence.forks:
            return
        successor, *successor.forks = sequence.forks
        sequence.forks = []
        successor.scores = sequence.scores
        self.waiting.insert(0 if sequence.row >= 0 else self.waiting.index(sequence), successor)

    def _end(self, sequence: Sequence) -> None:
        """Remove a finished or cancelled sequence; its request ends with its last sequence."""
        siblings = self._by_id[sequence.request.id]
        siblings.remove(sequence)
        self._num_sequences -= 1
        if not siblings:
            del self._by_id[sequence.request.id]
        if sequence.row >= 0:
            self._evict(sequence)
        elif parent := next((one for one in siblings if sequence in one.forks), None):
            parent.forks.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _admit(self) -> Sequence | None:
        """Run the next waiting sequence, if there is a table row and there are pages for all its tokens so far:
        otherwise it would be preempted at once. A cached prefix is not computed again."""
        if not self.waiting or not self._free_rows:
            return None
        sequence = self.waiting[0]
        can_share = (self.config.prefix_cache or sequence.index > 0) and sequence.scores is None
        shared = self.blocks.match(sequence.tokens) if can_share else []
        if self._num_pages(len(sequence.tokens)) - len(shared) > self.blocks.num_free_after(shared):
            return None
        self.waiting.popleft()
        sequence.row = heapq.heappop(self._free_rows)
        self.running.append(sequence)
        self.admitted.append(sequence)
        self.blocks.share(shared)
        self._page_updates += [(sequence.row, index, page) for index, page in enumerate(shared)]
        sequence.pages = shared
        sequence.num_computed = len(shared) * self.config.page_size
        sequence.num_registered = sequence.num_shared = len(shared)
        self.num_prompt_tokens += len(sequence.tokens)
        self.num_prefix_hits += sequence.num_computed
        return sequence

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _schedule(self, sequence: Sequence, budget: int, shares: list[Share]) -> int:
        """Add the sequence's share to the step. Returns its number of tokens: 0 if it must wait."""
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + budget)
        if sequence.scores is not None:
            end = self._end_of_scored(sequence, end)
        if end == start or not (self._extend(sequence, end) or self._preempt_for(sequence, end)):
            return 0
        sequence.num_computed = end
        num_logits = int(end == len(sequence.tokens))
        if sequence.scores is not None:
            num_logits = max(0, end - max(start, len(sequence.scores)))
            self._num_scored += num_logits - (end == len(sequence.tokens))
        chunk = Chunk(sequence.row, start, tuple(sequence.tokens[start:end]), num_logits)
        shares.append((sequence, chunk))
        return end - start

    def _end_of_scored(self, sequence: Sequence, end: int) -> int:
        """Where a chunk of a prompt to be scored must end, so that the step stays below MAX_SCORED."""
        limit = max(sequence.num_computed, len(sequence.scores or ())) + MAX_SCORED - self._num_scored
        return end if limit >= sequence.num_prompt - 1 else min(end, limit)  # the last token's logits are sampled

    def _add_drafts(self, shares: list[Share], budget: int) -> bool:
        """Add drafts to the step, from what is left of its budget and of the pages. Returns whether there are any."""
        if not self.config.speculative_tokens or len(self.running) > self.config.speculative_max_batch:
            return False
        return self.speculation.add_drafts(shares, min(budget, MAX_SCORED - self._num_scored), self._extend)

    def _register(self, sequence: Sequence) -> None:
        """Let others find a sequence's full pages, now that a sampled token has shown them to be finite."""
        size = self.config.page_size
        for index in range(sequence.num_registered, sequence.num_computed // size):
            self.blocks.register(sequence.pages, index, sequence.tokens[index * size : (index + 1) * size])
        sequence.num_registered = sequence.num_computed // size

    def _extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocate pages for the sequence's first num_tokens tokens. False if they run out."""
        pages = sequence.pages
        while len(pages) * self.config.page_size < num_tokens:
            page, sequence.reservation = self.blocks.allocate(
                pages, sequence.reservation, self._likely_pages(sequence) - len(pages)
            )
            if page is None:
                return False
            self._page_updates.append((sequence.row, len(pages), page))
            pages.append(page)
        return True

    def _likely_pages(self, sequence: Sequence) -> int:
        """Pages that the sequence may need soon: few reach max_new_tokens."""
        most = self._num_pages(sequence.num_prompt + sequence.request.params.max_new_tokens)
        return min(most, self._num_pages(len(sequence.tokens)) + _NUM_RESERVED)

    def _preempt_for(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt younger sequences until this one has enough pages. False if it is the youngest itself."""
        while True:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
            if self._extend(sequence, num_tokens):
                return True

    def _preempt(self, sequence: Sequence) -> None:
        """Move a sequence back to the head of the queue, to be computed again from its first token."""
        self.num_preemptions += 1
        self._evict(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)

    def _evict(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        self.blocks.cancel_reservation(sequence.reservation)
        sequence.pages, sequence.reservation = [], NO_RESERVATION
        self._page_updates = [update for update in self._page_updates if update[0] != sequence.row]
        self._freed.append(sequence.row)
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = -1
        self.running.remove(sequence)


def _attention_order(share: Share) -> tuple[int, ...]:
    """Decodes first, by the location of their keys: neighbours, and those with a common prefix, share attention
    calls."""
    sequence, chunk = share
    if len(chunk.tokens) > 1:
        return (1,)
    pages, shared = sequence.pages, sequence.num_shared
    return (0, pages[0], pages[max(0, shared - 1)], pages[shared])


def _spans(shares: Items[Share]) -> list[Span]:
    """What the chunks of a step score."""
    spans, row = [], 0
    for sequence, chunk in shares:
        if sequence.scores is not None and chunk.num_logits:
            end = chunk.start + len(chunk.tokens)
            targets = sequence.tokens[end - chunk.num_logits + 1 : end + 1]
            spans.append(Span(sequence, row, tuple(targets)))
        row += chunk.num_logits
    return spans


def _sampled_rows(shares: Items[Share]) -> list[int]:
    """The index of the logits from which each sequence's next token is sampled; those of its draft follow."""
    rows, row = [], 0
    for sequence, chunk in shares:
        row += chunk.num_logits
        if not sequence.num_uncomputed:
            rows.append(row - 1 - len(sequence.draft))
    return rows
