"""Executes plans: the same code with the same plans on every rank, so all ranks' caches stay alike.

Decides nothing. Its only memory between steps is the KV cache and the page table that the plans describe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_tp.config import EngineConfig
from llama_tp.engine.page_table import PageTable
from llama_tp.engine.request import Chunk, StepPlan
from llama_tp.model.attention import Batch
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
        # A prompt may be poisoned in one step and sampled in a later one.
        self._poisoned = torch.zeros(config.max_batch_size, dtype=torch.int32, device=device)
        self._rope = rope_table(model.args, config.max_seq_len, device)
        self.page_table = PageTable(
            num_rows=config.max_batch_size,
            num_pages=config.num_pages,
            page_size=config.page_size,
            bytes_per_slot=2 * num_kv_heads * model.args.head_dim * dtype.itemsize,
            dtype=dtype,
            device=device,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Compute one step. Float32 logits of the chunks that sample, in order, on the leader; else None."""
        for row in plan.freed:
            self.page_table.free(row)
        for row, index, page in plan.page_updates:
            self.page_table.set(row, index, page)
            if index == 0:
                self._poisoned[row] = 0
        if not plan.chunks:
            return None
        return self.model(self.prepare(plan.chunks), self.cache)

    def prepare(self, chunks: tuple[Chunk, ...]) -> Batch:
        """The tensors of one step. The page table must know the chunks' pages."""
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
            slots.extend(self.page_table.slots(chunk.row, span))
            if chunk.sample:
                sampled.append(len(tokens) - 1)
        packed = torch.tensor([tokens, positions, slots, rows]).to(self.device, non_blocking=True)
        return Batch(
            tokens=packed[0],
            rope=self._rope[packed[1]].unsqueeze(1),
            slots=packed[2],
            rows=packed[3],
            poisoned=self._poisoned,
            spans=self.page_table.spans(chunks),
            sampled=torch.tensor(sampled, dtype=torch.int64).to(self.device, non_blocking=True),
        )
