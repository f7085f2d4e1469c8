"""Executes plans: the same code with the same plans on every rank, so all ranks' caches stay alike.

In deterministic mode a step is computed in tiles of exactly TILE tokens, filled up with tokens that write to a page of
nobody's, and every query attends alone: so each reduction has a fixed shape, and a token's numbers are the same to the
bit in any company and in any chunks. Kernels choose how to add up by the shape of what they are given.

Decides nothing. Its memory between steps is the KV cache and the page table that the plans describe, and a guess: while
a GPU computes a step, the next one is laid out as if every sequence went on. Only time depends on whether it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_tp.config import EngineConfig
from llama_tp.engine.page_table import PageTable
from llama_tp.engine.request import Chunk, StepPlan
from llama_tp.model.attention import Batch, Span
from llama_tp.model.kv_cache import KVCache, Place, Run
from llama_tp.model.rope import rope_table
from llama_tp.model.transformer import Transformer

TILE = 16
"""Tokens of a tile: as many as a CPU multiplies in about the time that it reads the weights."""


class ModelRunner:
    """One rank's model, cache and page table. `num_kv_heads`: the kv heads that live on this rank."""

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        *,
        num_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.device = device
        self._nobody = config.max_batch_size  # a row, and behind all pages a slot, for what fills up a tile
        self._nowhere = config.num_pages * config.page_size
        self.cache = KVCache(
            n_layers=model.args.n_layers,
            num_pages=config.num_pages + config.deterministic,
            page_size=config.page_size,
            num_kv_heads=num_kv_heads,
            head_dim=model.args.head_dim,
            dtype=dtype,
            device=device,
        )
        # A prompt may be poisoned in one step and sampled in a later one.
        self._poisoned = torch.zeros(config.max_batch_size + 1, dtype=torch.int32, device=device)
        self._rope = rope_table(model.args, config.max_seq_len, device)
        self._guess: _Guess | None = None
        self.page_table = PageTable(self.cache, num_rows=config.max_batch_size, deterministic=config.deterministic)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Compute one step. Float32 logits of the chunks that sample, in order, on the leader; None if none does.

        On a GPU the step has merely been launched when this returns, and the next one is laid out already.
        """
        for row in plan.freed:
            self.page_table.free(row)
        for row, index, page in plan.page_updates:
            self.page_table.set(row, index, page)
            if index == 0:
                self._poisoned[row] = 0
        parts = []
        for batch, num_sampled in self._batches(plan):
            logits = self.model(batch, self.cache)
            if logits is not None:
                parts.append(logits[:num_sampled])
        self._guess = self._look_ahead(plan)
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _batches(self, plan: StepPlan) -> list[_Pass]:
        """The tensors of a step: those that were laid out in advance, if the guess was right."""
        guess, self._guess = self._guess, None
        if guess is None or plan.freed or not _is_guessed(guess.chunks, plan.chunks):
            return self._lay_out(plan.chunks)
        size = guess.passes[0][0].tokens.size(0)
        tokens = [chunk.tokens[0] for chunk in plan.chunks]
        parts = self._on_device(tokens + [0] * (-len(tokens) % size)).split(size)
        return [(replace(batch, tokens=part), num) for (batch, num), part in zip(guess.passes, parts, strict=True)]

    def _look_ahead(self, plan: StepPlan) -> _Guess | None:
        """Lay out the next step as it will be if every sequence goes on with the token that it samples now and nobody
        else joins: all of it except those tokens. None where the plan does not say enough."""
        chunks = []
        for chunk in plan.chunks:
            position = chunk.start + len(chunk.tokens)
            has_place = position < self.config.max_seq_len and self.page_table.covers(chunk.row, position)
            if not (chunk.sample and has_place):
                return None
            chunks.append(Chunk(chunk.row, position, (0,), sample=True))
        return _Guess(chunks, self._lay_out(chunks)) if chunks else None

    def _lay_out(self, chunks: Items[Chunk]) -> list[_Pass]:
        if not chunks:
            return []
        tiles, size = (_tiles(chunks), TILE) if self.config.deterministic else ((chunks,), 0)
        return [(self.prepare(tile, size), sum(chunk.sample for chunk in tile)) for tile in tiles]

    def prepare(self, chunks: Items[Chunk], size: int = 0) -> Batch:
        """The tensors of one forward pass, filled up to `size` tokens. The page table must know the chunks' pages."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + len(chunk.tokens))
            tokens.extend(chunk.tokens)
            positions.extend(span)
            rows.extend([chunk.row] * len(span))
            slots.extend(self.page_table.slots(chunk))
            if chunk.sample:
                sampled.append(len(tokens) - 1)
        spans = self.page_table.spans(chunks)
        if missing := max(0, size - len(tokens)):
            spans = (*spans, Span(slice(len(tokens), size), Run(self._nowhere, 1, count=missing)))
            tokens += [0] * missing
            positions += [0] * missing
            slots += [self._nowhere] * missing
            rows += [self._nobody] * missing
        if sampled:
            sampled += [0] * (size - len(sampled))
        packed = self._on_device([tokens, positions, slots, rows])
        return Batch(
            tokens=packed[0],
            rope=self._rope[packed[1]].unsqueeze(1),
            places=_places(chunks, slots, packed[2]),
            rows=packed[3],
            poisoned=self._poisoned,
            spans=spans,
            sampled=self._on_device(sampled),
        )

    def _on_device(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


_Pass = tuple[Batch, int]
"""One forward pass, and how many of its logits' rows, from the first, somebody asked for."""


@dataclass(frozen=True, slots=True)
class _Guess:
    """The next step, laid out before it is planned."""

    chunks: list[Chunk]
    """One token each, of which only the place is right."""
    passes: list[_Pass]


def _is_guessed(guess: Items[Chunk], chunks: Items[Chunk]) -> bool:
    """Whether a step computes one token each at just these places. That rows still belong to whom they did is the
    caller's to know."""
    return len(guess) == len(chunks) and all(
        one.row == two.row and one.start == two.start and len(two.tokens) == 1 and two.sample
        for one, two in zip(guess, chunks, strict=True)
    )


def _places(chunks: Items[Chunk], slots: list[int], on_device: Tensor) -> tuple[Place, ...]:
    """How the tokens of a step get to their slots (T,): a chunk in one piece where its slots are neighbours."""
    places: list[Place] = []
    first = at = 0  # tokens from first to at are to be written one by one
    for chunk in chunks:
        end = at + len(chunk.tokens)
        run = range(slots[at], slots[at] + end - at)
        if len(run) > 1 and slots[at:end] == list(run):
            if first < at:
                places.append((slice(first, at), on_device[first:at]))
            places.append((slice(at, end), slice(run.start, run.stop)))
            first = end
        at = end
    if first < len(slots):
        places.append((slice(first, len(slots)), on_device[first:]))
    return tuple(places)


def _tiles(chunks: Items[Chunk]) -> Iterator[list[Chunk]]:
    """The same tokens in the same order, TILE at a time."""
    tile: list[Chunk] = []
    room = TILE
    for chunk in chunks:
        at, end = 0, len(chunk.tokens)
        while at < end:
            take = min(room, end - at)
            last = at + take == end
            tile.append(Chunk(chunk.row, chunk.start + at, chunk.tokens[at : at + take], chunk.sample and last))
            at, room = at + take, room - take
            if room == 0:
                yield tile
                tile, room = [], TILE
    if tile:
        yield tile
