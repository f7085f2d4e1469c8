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

    def allowed(self, outputs: Items[tuple[str, int]], vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens the outputs, given as request id and index, may sample: (outputs, vocab_size) bool. Waits for
        the masks if necessary."""
        constraints = [self._constraints[request_id][index] for request_id, index in outputs]
        for one in constraints:
            one.ready.result()
        words = torch.stack([one.bits for one in constraints]).to(device, non_blocking=True)
        bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device)
        return (bits & 1).bool().flatten(1)[:, :vocab_size]

    def has_failed(self, request_id: str, index: int) -> bool:
        """Whether the output cannot go on because its grammar turned out to be too complex."""
        outputs = self._constraints.get(request_id)
        return outputs is not None and outputs[index].state.has_failed

    def forget(self, request_id: str) -> None:
        """Drop the state of a finished request."""
        self._constraints.pop(request_id, None)
