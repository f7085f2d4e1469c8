"""llama.cpp as a contender, through llama-cpp-python's bindings of its C API: batches, as its server computes them."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_tp.bench.contenders import Prompts, Timing

if TYPE_CHECKING:
    from llama_tp.bench.compare.engines import Work

_BATCH_TOKENS = 512
"""Tokens of one call: llama.cpp's default for a physical batch, and as many as our steps have."""


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, work: Work) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._lib.llama_backend_init()
        of_model = self._lib.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(work.path).encode(), of_model)
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {work.path}")
        of_context = self._lib.llama_context_default_params()
        of_context.n_ctx = work.batch * (-(-(work.prompt + work.new) // 256) * 256)
        of_context.n_seq_max = work.batch
        of_context.n_batch = of_context.n_ubatch = max(_BATCH_TOKENS, work.batch)
        of_context.n_threads = of_context.n_threads_batch = work.threads
        self._context = self._lib.llama_init_from_model(self._model, of_context)
        if not self._context:
            raise ValueError("llama.cpp has no memory for this context")
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._batch = self._lib.llama_batch_init(max(_BATCH_TOKENS, work.batch), 0, 1)

    def run(self, prompts: Prompts, new: int) -> Timing:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        start = perf_counter()
        last = [self._prefill(row, prompt) for row, prompt in enumerate(prompts)]
        times, first_tokens = [perf_counter()], [last[0]]
        for step in range(new - 1):
            last = self._decode(last, len(prompts[0]) + step)
            times.append(perf_counter())
            first_tokens.append(last[0])
        steps = tuple(late - early for early, late in pairwise(times))
        return Timing(times[0] - start, sum(steps), len(prompts) * (new - 1), steps, tuple(first_tokens))

    def _prefill(self, row: int, prompt: Any) -> int:
        """The first token after a prompt."""
        for start in range(0, len(prompt), _BATCH_TOKENS):
            tokens = prompt[start : start + _BATCH_TOKENS]
            is_last = start + len(tokens) == len(prompt)
            for index, token in enumerate(tokens):
                wanted = is_last and index == len(tokens) - 1
                self._set(index, token, start + index, row, wanted)
            self._compute(len(tokens))
        return self._greedy(len(tokens) - 1)

    def _decode(self, tokens: list[int], position: int) -> list[int]:
        for row, token in enumerate(tokens):
            self._set(row, token, position, row, True)
        self._compute(len(tokens))
        return [self._greedy(row) for row in range(len(tokens))]

    def _set(self, index: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wants_logits

    def _compute(self, count: int) -> None:
        self._batch.n_tokens = count
        if status := self._lib.llama_decode(self._context, self._batch):
            raise ValueError(f"llama_decode returned {status}")

    def _greedy(self, index: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
