"""Executes plans: the same code with the same plans on every rank, so all ranks' caches stay identical.

In deterministic mode a step is computed in tiles of exactly TILE tokens, padded if necessary, and every query attends
alone. Kernels choose their summation order by shape; this way every reduction has a fixed shape, and a token's results
are bit-identical however its sequence is batched and chunked.

Decides nothing. Its state between steps is the KV cache, the page table built from the plans, and a guess: while a GPU
computes a step, the next one is laid out as if every sequence continued. A wrong guess costs only time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_tp.config import EngineConfig
from llama_tp.engine.nonfinite import NonFinite
from llama_tp.engine.page_table import PageTable
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model.attention import AttentionBackend, SequenceTokens, choose_backend
from llama_tp.model.batch import Batch
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.rope import rope_table
from llama_tp.model.transformer import Transformer
from llama_tp.parallel.compiled import CompiledTransformer

TILE = 16
"""Tokens per tile: as many as a CPU can compute in about the time it takes to read the weights."""


class ModelRunner:
    """One rank's model, cache and page table.

    `num_kv_heads`: kv heads on this rank. `make_backend`: creates the attention backend for the cache.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        *,
        num_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        make_backend: Callable[[KVCache], AttentionBackend] | None = None,
    ) -> None:
        self.model: Transformer | CompiledTransformer = model
        self.config = config
        self.dtype = dtype
        self.device = device
        self.cache = KVCache(
            n_layers=model.args.n_layers,
            num_pages=config.num_pages + config.deterministic,  # the last one is for padding
            page_size=config.page_size,
            num_kv_heads=num_kv_heads,
            head_dim=model.args.head_dim,
            dtype=dtype,
            device=device,
        )
        self.page_table = PageTable(num_rows=config.max_batch_size, page_size=config.page_size)
        self._attention = (
            make_backend(self.cache) if make_backend else choose_backend(self.cache, deterministic=config.deterministic)
        )
        self._padding_row = config.max_batch_size
        self._nonfinite = NonFinite(config.max_batch_size + 1, device)
        self._rope = rope_table(model.args, config.max_seq_len, device)
        self._guess: _Guess | None = None
        self._tile_padding = TILE
        self.before_step: Callable[[], bool] | None = None
        """Called before each step until it returns True."""

    def use_kernels(self, model: CompiledTransformer, attention: AttentionBackend) -> None:
        """Compute later steps with compiled kernels. In deterministic mode their results for a token do not depend on
        the rest of its tile, which needs no padding."""
        self.model = model
        self._attention = attention
        self._tile_padding = 0
        self._guess = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Compute one step. On the leader, returns the float32 logits that the chunks need, in order, or None if they
        need none. Logits that depend on a token with a non-finite hidden state contain a NaN.

        On a GPU the step has only been launched when this returns, and the next one is already laid out.
        """
        if self.before_step is not None and self.before_step():
            self.before_step = None
        for row in plan.freed:
            self.page_table.free(row)
        for row, index, page in plan.page_updates:
            self.page_table[row].set(index, page)
            if index == 0:
                self._nonfinite.begin(row)
        for chunk in plan.chunks:
            self._nonfinite.advance(chunk.row, chunk.start, len(chunk.tokens))
        parts = [self._forward(one) for one in self._passes(plan)]
        logits = [part for part in parts if part is not None]
        self._guess = self._look_ahead(plan)
        if not logits:
            return None
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _forward(self, one: _Pass) -> Tensor | None:
        logits, is_finite = self.model(one.batch, self.cache)
        depends = self._nonfinite.depends(is_finite, one.table_rows, one.positions, one.batch.sampled)
        if logits is None:
            return None
        if depends is not None:
            logits[:, 0].masked_fill_(depends, float("nan"))
        return logits[: one.num_sampled]

    def _passes(self, plan: StepPlan) -> list[_Pass]:
        """The tensors of a step, laid out in advance if the guess was right."""
        guess, self._guess = self._guess, None
        if guess is None or plan.freed or not _is_guessed(guess.chunks, plan.chunks):
            return self._lay_out(plan.chunks)
        sizes = [one.batch.tokens.size(0) for one in guess.passes]
        tokens = [chunk.tokens[0] for chunk in plan.chunks]
        parts = self._on_device(tokens + [0] * (sum(sizes) - len(tokens))).split(sizes)
        return [
            replace(one, batch=replace(one.batch, tokens=part)) for one, part in zip(guess.passes, parts, strict=True)
        ]

    def _look_ahead(self, plan: StepPlan) -> _Guess | None:
        """Lay out the next step, except its tokens, as if every sequence continued and none joined. None if that
        cannot be, or if it is unknown where one continues because its chunk may end with a draft."""
        chunks = []
        for chunk in plan.chunks:
            position = chunk.start + len(chunk.tokens)
            has_slot = position < self.config.max_seq_len and self.page_table[chunk.row].covers(position)
            if not (chunk.num_logits == 1 and has_slot):
                return None
            chunks.append(Chunk(chunk.row, position, (0,), num_logits=1))
        return _Guess(chunks, self._lay_out(chunks)) if chunks else None

    def _lay_out(self, chunks: Items[Chunk]) -> list[_Pass]:
        if not chunks:
            return []
        if not self.config.deterministic:
            return [self.prepare(chunks)]
        return [self.prepare(tile, self._tile_padding) for tile in _tiles(chunks)]

    def prepare(self, chunks: Items[Chunk], size: int = 0) -> _Pass:
        """The tensors of one forward pass, padded to `size` tokens. The page table must contain the chunks' pages."""
        tokens: list[int] = []
        positions: list[int] = []
        table_rows: list[int] = []
        sampled: list[int] = []
        for chunk in chunks:
            tokens.extend(chunk.tokens)
            positions.extend(range(chunk.start, chunk.start + len(chunk.tokens)))
            table_rows.extend([chunk.row] * len(chunk.tokens))
            sampled.extend(range(len(tokens) - chunk.num_logits, len(tokens)))
        num_sampled = len(sampled)
        num_padding = max(0, size - len(tokens))
        for values, padding in ((tokens, 0), (positions, 0), (table_rows, self._padding_row)):
            values.extend([padding] * num_padding)
        if sampled:
            sampled += [0] * (size - num_sampled)
        sequences = [SequenceTokens(self.page_table[one.row], one.start, len(one.tokens)) for one in chunks]
        packed = self._on_device([tokens, positions, table_rows])
        batch = Batch(
            tokens=packed[0],
            rope=self._rope.index_select(0, packed[1]).unsqueeze(1),
            attention=self._attention.prepare(sequences, num_padding=num_padding),
            sampled=self._on_device(sampled),
        )
        return _Pass(batch, packed[1], packed[2], num_sampled)

    def _on_device(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass."""

    batch: Batch
    positions: Tensor
    """(T,) each token's."""
    table_rows: Tensor
    """(T,) the page table row of each token's sequence."""
    num_sampled: int
    """How many of the logits are real; the rest are padding."""


@dataclass(frozen=True, slots=True)
class _Guess:
    """The next step, laid out before it is planned."""

    chunks: list[Chunk]
    """One token each; only row and position are meaningful."""
    passes: list[_Pass]


def _is_guessed(guess: Items[Chunk], chunks: Items[Chunk]) -> bool:
    """Whether a step computes one token each at exactly these table rows and positions. The caller checks that the rows
    still belong to the same sequences."""
    return len(guess) == len(chunks) and all(
        one.row == two.row and one.start == two.start and len(two.tokens) == two.num_logits == 1
        for one, two in zip(guess, chunks, strict=True)
    )


def _tiles(chunks: Items[Chunk]) -> Iterator[list[Chunk]]:
    """The same tokens in the same order, in groups of TILE."""
    tile: list[Chunk] = []
    free = TILE
    for chunk in chunks:
        at, end = 0, len(chunk.tokens)
        while at < end:
            take = min(free, end - at)
            num_logits = max(0, at + take - max(at, end - chunk.num_logits))
            tile.append(Chunk(chunk.row, chunk.start + at, chunk.tokens[at : at + take], num_logits))
            at, free = at + take, free - take
            if free == 0:
                yield tile
                tile, free = [], TILE
    if tile:
        yield tile
