"""Which tokens each constrained sequence may sample next.

A mask depends only on the sequence's tokens, so it is computed in a thread as soon as the newest token is known, while
the next step is planned and executed. The thread works outside of Python and of OpenMP, so it does not delay a step.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_tp.engine.grammar import GrammarState, TokenGrammar


@dataclass(slots=True)
class _Constraint:
    """One sequence's grammar and its next mask."""

    state: GrammarState
    bits: Tensor
    """(words,) int32."""
    ready: Future[None] = field(default_factory=Future)

    def fill(self) -> None:
        self.state.fill_mask(self.bits.data_ptr(), self.bits.nbytes)

    def advance(self, token_id: int) -> None:
        self.state.accept(token_id)
        self.fill()


class TokenMasks:
    """The masks of all sequences that have a grammar."""

    def __init__(self) -> None:
        self._constraints: dict[str, list[_Constraint]] = {}
        self._thread: ThreadPoolExecutor | None = None
        bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
        self._bias_of_byte = torch.zeros(256, 8).masked_fill_(bits == 0, float("-inf"))

    def __len__(self) -> int:
        """Requests with a grammar."""
        return len(self._constraints)

    def begin(self, request_id: str, grammar: TokenGrammar, n: int) -> None:
        """Compute the first mask of a request's n outputs."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "token masks")
        outputs = []
        for _ in range(n):
            one = _Constraint(grammar.start(), torch.zeros(-(-grammar.num_tokens // 32), dtype=torch.int32))
            one.ready = self._thread.submit(one.fill)
            outputs.append(one)
        self._constraints[request_id] = outputs

    def advance(self, request_id: str, index: int, token_id: int) -> None:
        """Begin to compute the mask of the output's next token."""
        assert self._thread is not None
        one = self._constraints[request_id][index]
        one.ready = self._thread.submit(one.advance, token_id)

    def biases(self, outputs: Items[tuple[str, int]], vocab_size: int, device: torch.device) -> Tensor:
        """What to add to the logits of outputs, given as request id and index: 0 for tokens that may come next, minus
        infinity for others; (outputs, vocab_size) float32. Waits for the masks if necessary."""
        constraints = [self._constraints[request_id][index] for request_id, index in outputs]
        for one in constraints:
            one.ready.result()
        masks = torch.stack([one.bits for one in constraints]).view(torch.uint8).to(device, non_blocking=True)
        if self._bias_of_byte.device != device:
            self._bias_of_byte = self._bias_of_byte.to(device)
        # On a CPU, this takes a tenth of the time of torch.where with a bool per token.
        biases = self._bias_of_byte.index_select(0, masks.flatten().int())
        return biases.view(len(outputs), -1)[:, :vocab_size]

    def has_failed(self, request_id: str, index: int) -> bool:
        """Whether the output cannot go on because its grammar turned out to be too complex."""
        outputs = self._constraints.get(request_id)
        return outputs is not None and outputs[index].state.has_failed

    def forget(self, request_id: str) -> None:
        """Drop the state of a finished request."""
        self._constraints.pop(request_id, None)
