"""Logits and per-request parameters -> token ids.

Order of operations: the penalties, logit_bias, min_new_tokens (`edit`); then temperature, top_k, top_p, min_p, each on
what the one before it left (`probabilities`); then one draw. Every sequence has a generator of its own, so its draws do
not depend on who shares the batch. Greedy rows touch no generator. All of it is vectorised over the rows that ask for
it, and rows that ask for nothing cost nothing.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llama_tp.engine.request import Logprobs
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.sequence import Sequence


@dataclass(slots=True)
class _State:
    """What the sampler remembers of a sequence. Grows with each token, so that no step looks at all of them."""

    generator: torch.Generator | None = None
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """Distinct token ids of prompt and output."""
    counts: array[float] = field(default_factory=lambda: array("f"))
    """How often each of them is in the output."""
    places: dict[int, int] = field(default_factory=dict)
    """Where each of them is in `tokens`."""
    num_seen: int = 0

    def see(self, sequence: Sequence) -> None:
        """Take in what the sequence got since the last time."""
        for at in range(self.num_seen, len(sequence.tokens)):
            token = sequence.tokens[at]
            place = self.places.get(token)
            if place is None:
                place = self.places[token] = len(self.tokens)
                self.tokens.append(token)
                self.counts.append(0.0)
            if at >= sequence.num_prompt:
                self.counts[place] += 1
        self.num_seen = len(sequence.tokens)


class Sampler:
    """Keeps one generator, and the token counts that penalties need, per sequence."""

    def __init__(self) -> None:
        self._states: dict[str, dict[int, _State]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is remembered."""
        return not self._states

    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> tuple[list[int | None], dict[int, Logprobs]]:
        """One id per row of float32 logits (R, V), None where the row's logits are not finite or all of them ruled out;
        and by row, for the rows that ask, what the unmodified logits say of the ids."""
        edited = self.edit(logits, sequences)
        ids = argmax(edited)
        # A NaN or +inf anywhere in a row shows in its maximum.
        finite = edited.gather(-1, ids.unsqueeze(-1)).squeeze(-1).isfinite()
        if edited is not logits:
            finite &= logits.amax(dim=-1).isfinite()
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.params.is_greedy]
        if drawn:
            rows = _on(logits, drawn)
            params = [sequences[row].request.params for row in drawn]
            probs = probabilities(edited[rows], params)
            noise = torch.stack([self._noise(sequences[row], probs) for row in drawn])
            ids[rows] = argmax(probs / noise)  # the winner of an exponential race is a draw from probs
        ids.masked_fill_(~finite, -1)
        asked = [row for row, sequence in enumerate(sequences) if sequence.request.params.logprobs is not None]
        parts = [ids]
        if asked:
            counts = [sequences[row].request.params.logprobs or 0 for row in asked]
            parts += _logprobs(logits, ids, _on(logits, asked), max(counts))
        # One copy from the device: the only time that the host waits for it.
        host = _together(parts)
        tokens = [None if token < 0 else int(token) for token in host[0]]
        if not asked:
            return tokens, {}
        _, chosen, values, tops = host
        width = len(values) // len(asked)
        return tokens, {
            row: Logprobs(
                chosen[i],
                tuple((int(tops[at]), values[at]) for at in range(i * width, i * width + min(width, counts[i]))),
            )
            for i, row in enumerate(asked)
            if tokens[row] is not None
        }

    def edit(self, logits: Tensor, sequences: Items[Sequence]) -> Tensor:
        """The logits (R, V) after penalties, logit_bias and min_new_tokens: themselves where no row asks for any.

        Only the logits of tokens that a sequence holds, or that a request names, are looked at.
        """
        params = [sequence.request.params for sequence in sequences]
        penalized = [row for row, one in enumerate(params) if one.has_penalty]
        biased = [row for row, one in enumerate(params) if one.logit_bias]
        too_short = [
            row
            for row, sequence in enumerate(sequences)
            if sequence.num_generated < params[row].min_new_tokens and params[row].stop_ids
        ]
        if not (penalized or biased or too_short):
            return logits
        edited = logits.clone()
        flat = edited.view(-1)
        if penalized:
            self._penalize(flat, [(row, sequences[row]) for row in penalized], edited.size(-1))
        if biased:
            where = [row * edited.size(-1) + token for row in biased for token in params[row].logit_bias]
            bias = [float(value) for row in biased for value in params[row].logit_bias.values()]
            flat.index_add_(0, _on(flat, where), _on(flat, bias))
        if too_short:
            where = [row * edited.size(-1) + token for row in too_short for token in params[row].stop_ids]
            flat.index_fill_(0, _on(flat, where), float("-inf"))
        return edited

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._states.pop(request_id, None)

    def _penalize(self, flat: Tensor, rows: list[tuple[int, Sequence]], vocab_size: int) -> None:
        """Change the logits of the tokens that each row's sequence holds, in place."""
        states, sizes = [], []
        for _, sequence in rows:
            state = self._state(sequence)
            state.see(sequence)
            states.append(state)
            sizes.append(len(state.tokens))
        repeats = torch.tensor(sizes)
        # Copies, made here and now: an array that lends its memory cannot grow.
        tokens = torch.cat([torch.frombuffer(state.tokens, dtype=torch.int64) for state in states])
        counts = _on(flat, torch.cat([torch.frombuffer(state.counts, dtype=torch.float32) for state in states]))
        firsts = torch.tensor([row * vocab_size for row, _ in rows]).repeat_interleave(repeats)
        where = _on(flat, tokens + firsts)
        params = [sequence.request.params for _, sequence in rows]
        penalties = torch.tensor([(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params])
        repetition, presence, frequency = _on(flat, penalties.repeat_interleave(repeats, dim=0)).unbind(-1)
        values = flat[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[where] = values - presence * (counts > 0) - frequency * counts

    def _state(self, sequence: Sequence) -> _State:
        return self._states.setdefault(sequence.request.id, {}).setdefault(sequence.index, _State())

    def _noise(self, sequence: Sequence, like: Tensor) -> Tensor:
        """Exponential(1) variates (V,) from the sequence's generator."""
        state = self._state(sequence)
        if state.generator is None:
            state.generator = torch.Generator(like.device)
            seed = sequence.request.params.seed
            if seed is None:
                state.generator.seed()
            else:
                state.generator.manual_seed((seed + sequence.index) % 2**63)
        return torch.empty(like.size(-1), device=like.device).exponential_(generator=state.generator)


def argmax(x: Tensor) -> Tensor:
    """The first of the largest elements of each row (R, V): (R,). NumPy's is 15 times as fast as torch's on a CPU."""
    return x.argmax(dim=-1) if x.is_cuda else torch.from_numpy(x.numpy().argmax(axis=-1))


def _logprobs(logits: Tensor, ids: Tensor, rows: Tensor, count: int) -> list[Tensor]:
    """Of A rows: the log probability of each one's id (A,), and the `count` highest with their ids, (A, count) both."""
    logs = torch.log_softmax(logits[rows], dim=-1)
    chosen = logs.gather(-1, ids[rows].clamp_(min=0).unsqueeze(-1)).squeeze(-1)
    values, tokens = logs.topk(min(count, logs.size(-1)), dim=-1)
    return [chosen, values, tokens]


def _together(parts: list[Tensor]) -> list[list[float]]:
    """The elements of each part. Several travel as one tensor: float64 holds float32 and token ids exactly."""
    if len(parts) == 1:
        return [parts[0].tolist()]
    values = torch.cat([part.flatten().double() for part in parts]).tolist()
    ends = list(accumulate(part.numel() for part in parts))
    return [values[end - part.numel() : end] for part, end in zip(parts, ends, strict=True)]


def _on(like: Tensor, values: list[int] | list[float] | Tensor) -> Tensor:
    """Values of the host where `like` is; torch.tensor(values, device=...) would wait for all that is to do there."""
    return torch.as_tensor(values).to(like.device, non_blocking=True)


def probabilities(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """The distributions (R, V) that rows of float32 logits are drawn from, filtered as each row's parameters say."""

    def column(values: list[float]) -> Tensor:
        return _on(logits, values).unsqueeze(-1)  # (R, 1)

    probs = torch.softmax(logits / column([p.temperature for p in params]), dim=-1)
    if any(p.top_k or p.top_p < 1 for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(ordered.size(-1), device=logits.device)
        ordered = ordered.masked_fill(ranks >= column([p.top_k or ordered.size(-1) for p in params]), 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered  # what more probable tokens add up to
        tail = before >= column([p.top_p if p.top_p < 1 else 2.0 for p in params])
        ordered = ordered.masked_fill(tail & (ranks > 0), 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    if any(p.min_p for p in params):
        floor = probs.amax(dim=-1, keepdim=True) * column([p.min_p for p in params])
        probs = probs.masked_fill(probs < floor, 0)
    return probs
