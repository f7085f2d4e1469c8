"""Executes plans: the same code with the same plans on every rank, so all ranks' caches stay alike.

Decides nothing. Its only memory between steps is the KV cache and the page table that the plans describe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_tp.config import EngineConfig
from llama_tp.engine.request import Chunk, StepPlan
from llama_tp.model.attention import Batch, Span
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.rope import rope_table
from llama_tp.model.transformer import Transformer


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
        self.cache = KVCache(
            n_layers=model.args.n_layers,
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_kv_heads=num_kv_heads,
            head_dim=model.args.head_dim,
            dtype=dtype,
            device=device,
        )
        self._rope = rope_table(model.args, config.max_seq_len, device)
        self._pages: list[list[int]] = [[] for _ in range(config.max_batch_size)]
        self._is_run = [True] * config.max_batch_size  # whether a row's pages are neighbours, in order

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Compute one step. Float32 logits of the chunks that sample, in order, on the leader; else None."""
        for row, index, page in plan.page_updates:
            self._set_page(row, index, page)
        if not plan.chunks:
            return None
        return self.model(self.prepare(plan.chunks), self.cache)

    def _set_page(self, row: int, index: int, page: int) -> None:
        pages = self._pages[row]
        del pages[index:]  # entry 0 of a row begins a new sequence
        self._is_run[row] = index == 0 or (self._is_run[row] and page == pages[-1] + 1)
        pages.append(page)

    def prepare(self, chunks: tuple[Chunk, ...]) -> Batch:
        """The tensors of one step. The page table must know the chunks' pages."""
        size = self.config.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[int] = []
        for chunk in chunks:
            pages = self._pages[chunk.row]
            span = range(chunk.start, chunk.start + len(chunk.tokens))
            tokens.extend(chunk.tokens)
            positions.extend(span)
            slots.extend(pages[position // size] * size + position % size for position in span)
            if chunk.sample:
                sampled.append(len(tokens) - 1)
        packed = torch.tensor([tokens, positions, slots]).to(self.device, non_blocking=True)
        return Batch(
            tokens=packed[0],
            rope=self._rope[packed[1]].unsqueeze(1),
            slots=packed[2],
            spans=self._spans(chunks),
            sampled=torch.tensor(sampled, dtype=torch.int64).to(self.device, non_blocking=True),
        )

    def _spans(self, chunks: tuple[Chunk, ...]) -> tuple[Span, ...]:
        """Chunks of one token come first in a plan; several of them share one span."""
        num_single = sum(len(chunk.tokens) == 1 for chunk in chunks)
        spans = []
        if num_single > 1:
            spans.append(self._single_token_span(chunks[:num_single]))
        row = num_single if spans else 0
        for chunk in chunks[row:]:
            spans.append(self._chunk_span(chunk, slice(row, row + len(chunk.tokens))))
            row += len(chunk.tokens)
        return tuple(spans)

    def _chunk_span(self, chunk: Chunk, rows: slice) -> Span:
        length = chunk.start + len(chunk.tokens)
        pages = self._pages[chunk.row]
        keys: slice | Tensor
        if self._is_run[chunk.row]:
            first = pages[0] * self.config.page_size
            keys = slice(first, first + length)
        else:
            keys = self._slots_of([pages])[0, :length]
        if len(chunk.tokens) == 1:
            return Span(rows, keys)
        if chunk.start == 0:
            return Span(rows, keys, causal=True)
        queries = torch.arange(chunk.start, length, device=self.device).unsqueeze(1)
        return Span(rows, keys, mask=self._hide(torch.arange(length, device=self.device) > queries))

    def _single_token_span(self, chunks: tuple[Chunk, ...]) -> Span:
        lengths = torch.tensor([chunk.start + 1 for chunk in chunks], device=self.device)
        used = -(-(max(chunk.start for chunk in chunks) + 1) // self.config.page_size)
        keys = self._slots_of([self._pages[chunk.row][:used] for chunk in chunks])
        hidden = torch.arange(keys.size(1), device=self.device) >= lengths.unsqueeze(1)
        return Span(slice(0, len(chunks)), keys, mask=self._hide(hidden)[:, None, None, :])

    def _slots_of(self, pages: list[list[int]]) -> Tensor:
        """All slots of each list of pages, padded with page 0 to the longest: (B, S)."""
        longest = max(map(len, pages))
        table = torch.tensor([row + [0] * (longest - len(row)) for row in pages]).to(self.device, non_blocking=True)
        offsets = torch.arange(self.config.page_size, device=self.device)
        return (table.unsqueeze(-1) * self.config.page_size + offsets).flatten(1)

    def _hide(self, hidden: Tensor) -> Tensor:
        """An additive mask: minus infinity where hidden."""
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
