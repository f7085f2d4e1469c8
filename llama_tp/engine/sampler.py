"""Logits and per-request parameters -> token ids.

Order of operations: penalties, logit_bias, allowed_ids, bad_words, min_new_tokens, the grammar's mask (`edit`); then
temperature, top_k, top_p, min_p, each applied to the result of the previous one (`probabilities`); then one draw. Every
sequence has its own generator, so its draws do not depend on the rest of the batch. Greedy sequences use no generator.
Each operation is vectorized over the sequences that request it; the others cost nothing.

Legend: S sampled sequences, V vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llama_tp.engine.draw import draw
from llama_tp.engine.request import Logprobs, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.sequence import Sequence
from llama_tp.engine.token_masks import TokenMasks


@dataclass(slots=True)
class _State:
    """Per-sequence state, updated incrementally so that no step scans all tokens."""

    generator: torch.Generator | None = None
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """Distinct token ids in prompt and output."""
    counts: array[float] = field(default_factory=lambda: array("f"))
    """How often each occurs in the output."""
    index_of: dict[int, int] = field(default_factory=dict)
    """Token id -> index in `tokens`."""
    num_seen: int = 0

    def update(self, sequence: Sequence) -> None:
        """Count the tokens added since the last update."""
        for at in range(self.num_seen, len(sequence.tokens)):
            token = sequence.tokens[at]
            index = self.index_of.get(token)
            if index is None:
                index = self.index_of[token] = len(self.tokens)
                self.tokens.append(token)
                self.counts.append(0.0)
            if at >= sequence.num_prompt:
                self.counts[index] += 1
        self.num_seen = len(sequence.tokens)


_NOT_FINITE, _RULED_OUT = -1, -2
"""Instead of a token id: there is none, because the logits are not finite, or because no token is allowed."""


class Sampler:
    """Keeps one generator, the token counts that penalties need, and the next mask of a grammar per sequence."""

    def __init__(self) -> None:
        self._states: dict[str, dict[int, _State]] = {}
        self._masks = TokenMasks()
        self._ruled_out: set[tuple[str, int]] = set()  # request id and index of the last step's outputs

    @property
    def is_idle(self) -> bool:
        """Whether there is no state left."""
        return not self._states and not self._masks

    def begin(self, request: Request) -> None:
        """Prepare for a request's first tokens."""
        if request.grammar is not None:
            self._masks.begin(request.id, request.grammar, request.params.n)

    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> tuple[list[int | None], dict[int, Logprobs]]:
        """One id per sequence from float32 logits (S, V), None if its logits are non-finite or all ruled out; and the
        log probabilities under the unmodified logits, by index, for the sequences that request them."""
        edited = self.edit(logits, sequences)
        ids = argmax(edited)
        # The maximum shows a NaN or +inf anywhere in the logits.
        finite = edited.gather(-1, ids.unsqueeze(-1)).squeeze(-1).abs() < math.inf
        ruled_out = None
        if edited is not logits:
            were_finite = logits.amax(dim=-1).isfinite()
            finite, ruled_out = finite & were_finite, were_finite & ~finite
        drawn = [index for index, sequence in enumerate(sequences) if not sequence.request.params.is_greedy]
        if drawn:
            ids[_on(logits, drawn)] = self._draw(edited, sequences, drawn)
        ids = torch.where(finite, ids, _NOT_FINITE)
        if ruled_out is not None:
            ids.masked_fill_(ruled_out, _RULED_OUT)
        asked = [index for index, sequence in enumerate(sequences) if sequence.request.params.logprobs is not None]
        parts = [ids]
        if asked:
            counts = [sequences[index].request.params.logprobs or 0 for index in asked]
            parts += _logprobs(logits, ids, _on(logits, asked), max(counts))
        # One copy from the device: the only point where the host waits for it.
        host = _together(parts)
        tokens = [None if token < 0 else int(token) for token in host[0]]
        self._ruled_out = set()
        if ruled_out is not None:
            outputs = zip(sequences, host[0], strict=True)
            self._ruled_out = {(one.request.id, one.index) for one, token in outputs if token == _RULED_OUT}
        if self._masks:
            self._prepare_masks(sequences, tokens)
        if not asked:
            return tokens, {}
        _, chosen, values, tops = host
        width = len(values) // len(asked)
        return tokens, {
            index: Logprobs(
                chosen[i],
                tuple((int(tops[at]), values[at]) for at in range(i * width, i * width + min(width, counts[i]))),
            )
            for i, index in enumerate(asked)
            if tokens[index] is not None
        }

    def edit(self, logits: Tensor, sequences: Items[Sequence]) -> Tensor:
        """The logits (S, V) after penalties, logit_bias, allowed_ids, bad_words, min_new_tokens and the masks of
        grammars; the same tensor if no sequence has any.

        Reads only the logits of tokens that a sequence contains or a request names.
        """
        requests = [sequence.request for sequence in sequences]
        if not any(one.params.edits_logits or one.grammar is not None for one in requests):
            return logits
        params = [one.params for one in requests]
        penalized = [index for index, one in enumerate(params) if one.has_penalty]
        biased = [index for index, one in enumerate(params) if one.logit_bias]
        restricted = [index for index, one in enumerate(params) if one.allowed_ids is not None]
        banned = [
            (index, token)
            for index, one in enumerate(params)
            if one.bad_words or one.min_new_tokens
            for token in _banned(sequences[index])
        ]
        constrained = [index for index, one in enumerate(requests) if one.grammar is not None]
        if not (penalized or biased or restricted or banned or constrained):
            return logits
        edited = logits.clone()
        flat = edited.view(-1)
        if penalized:
            self._penalize(flat, [(index, sequences[index]) for index in penalized], edited.size(-1))
        if biased:
            where = [index * edited.size(-1) + token for index in biased for token in params[index].logit_bias]
            bias = [float(value) for index in biased for value in params[index].logit_bias.values()]
            flat.index_add_(0, _on(flat, where), _on(flat, bias))
        for index in restricted:
            allowed = _on(flat, list(params[index].allowed_ids or ()))
            edited[index] = torch.full_like(edited[index], float("-inf")).index_copy(0, allowed, edited[index, allowed])
        if banned:
            where = [index * edited.size(-1) + token for index, token in banned]
            flat.index_fill_(0, _on(flat, where), float("-inf"))
        if constrained:
            outputs = [(sequences[index].request.id, sequences[index].index) for index in constrained]
            biases = self._masks.biases(outputs, logits.size(-1), logits.device)
            edited.index_add_(0, _on(logits, constrained), biases)
        return edited

    def forget(self, request_id: str) -> None:
        """Drop the state of a finished request."""
        self._states.pop(request_id, None)
        self._masks.forget(request_id)

    def has_no_mask(self, request_id: str, index: int) -> bool:
        """Whether an output cannot go on because its grammar turned out to be too complex."""
        return self._masks.has_failed(request_id, index)

    def has_ruled_out_all(self, request_id: str, index: int) -> bool:
        """Whether the request's own parameters left its output no token to sample in the last step."""
        return (request_id, index) in self._ruled_out

    def _prepare_masks(self, sequences: Items[Sequence], tokens: Items[int | None]) -> None:
        """Begin to compute the masks of the sequences' next tokens."""
        for sequence, token in zip(sequences, tokens, strict=True):
            request = sequence.request
            if request.grammar is not None and token is not None and token not in request.params.stop_ids:
                self._masks.advance(request.id, sequence.index, token)

    def _penalize(self, flat: Tensor, penalized: list[tuple[int, Sequence]], vocab_size: int) -> None:
        """Penalize in place the logits of the tokens that each sequence contains."""
        states, sizes = [], []
        for _, sequence in penalized:
            state = self._state(sequence)
            state.update(sequence)
            states.append(state)
            sizes.append(len(state.tokens))
        repeats = torch.tensor(sizes)
        # Copy immediately: an array cannot grow while its buffer is exported.
        tokens = torch.cat([torch.frombuffer(state.tokens, dtype=torch.int64) for state in states])
        counts = _on(flat, torch.cat([torch.frombuffer(state.counts, dtype=torch.float32) for state in states]))
        firsts = torch.tensor([index * vocab_size for index, _ in penalized]).repeat_interleave(repeats)
        where = _on(flat, tokens + firsts)
        params = [sequence.request.params for _, sequence in penalized]
        penalties = torch.tensor([(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params])
        repetition, presence, frequency = _on(flat, penalties.repeat_interleave(repeats, dim=0)).unbind(-1)
        values = flat[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[where] = values - presence * (counts > 0) - frequency * counts

    def _state(self, sequence: Sequence) -> _State:
        return self._states.setdefault(sequence.request.id, {}).setdefault(sequence.index, _State())

    def _draw(self, logits: Tensor, sequences: Items[Sequence], drawn: list[int]) -> Tensor:
        """Ids for the sequences at these indices. On a GPU without waiting for it."""
        rows = logits[_on(logits, drawn)]
        params = [sequences[index].request.params for index in drawn]
        generators = [self._generator(sequences[index], logits.device) for index in drawn]
        if logits.is_cuda:
            probs = probabilities(rows, params)
            noise = torch.stack([torch.empty_like(probs[0]).exponential_(generator=one) for one in generators])
            return argmax(probs / noise)  # the winner of an exponential race is a draw from probs
        probs = torch.softmax(rows / _column(rows, [one.temperature for one in params]), dim=-1)
        uniforms = [float(torch.rand(1, generator=one).numpy()[0]) for one in generators]
        return torch.tensor(list(map(draw, probs.numpy(), params, uniforms)))

    def _generator(self, sequence: Sequence, device: torch.device) -> torch.Generator:
        """The sequence's own."""
        state = self._state(sequence)
        if state.generator is None:
            state.generator = torch.Generator(device)
            seed = sequence.request.params.seed
            if seed is None:
                state.generator.seed()
            else:
                state.generator.manual_seed((seed + sequence.index) % 2**63)
        return state.generator


def _banned(sequence: Sequence) -> Iterator[int]:
    """Tokens that must not come next: ends of bad words, and stop ids before min_new_tokens."""
    params, tokens = sequence.request.params, sequence.tokens
    for *before, last in params.bad_words:
        if len(before) <= sequence.num_generated and tokens[len(tokens) - len(before) :] == before:
            yield last
    if sequence.num_generated < params.min_new_tokens:
        yield from params.stop_ids


def argmax(x: Tensor) -> Tensor:
    """Index of the first maximum, (S, V) -> (S,). On a CPU, NumPy's is 15 times as fast as torch's."""
    return x.argmax(dim=-1) if x.is_cuda else torch.from_numpy(x.numpy().argmax(axis=-1))


def _logprobs(logits: Tensor, ids: Tensor, indices: Tensor, count: int) -> list[Tensor]:
    """For A of the sequences: the log probability of the id (A,), the `count` highest (A, count), and their ids."""
    logs = torch.log_softmax(logits[indices], dim=-1)
    chosen = logs.gather(-1, ids[indices].clamp_(min=0).unsqueeze(-1)).squeeze(-1)
    values, tokens = logs.topk(min(count, logs.size(-1)), dim=-1)
    return [chosen, values, tokens]


def _together(parts: list[Tensor]) -> list[list[float]]:
    """The elements of each part, copied as one tensor: float64 represents float32 and token ids exactly."""
    if len(parts) == 1:
        return [parts[0].tolist()]
    values = torch.cat([part.flatten().double() for part in parts]).tolist()
    ends = list(accumulate(part.numel() for part in parts))
    return [values[end - part.numel() : end] for part, end in zip(parts, ends, strict=True)]


def _on(like: Tensor, values: list[int] | list[float] | Tensor) -> Tensor:
    """Host values on the device of `like`, without waiting for the device as torch.tensor(values, device=...) would."""
    return torch.as_tensor(values).to(like.device, non_blocking=True)


def _column(like: Tensor, values: list[float]) -> Tensor:
    """(R, 1)"""
    return _on(like, values).unsqueeze(-1)


def probabilities(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """The distributions (S, V) to sample from, filtered by each sequence's parameters."""

    def column(values: list[float]) -> Tensor:
        return _column(logits, values)

    probs = torch.softmax(logits / column([p.temperature for p in params]), dim=-1)
    if any(p.top_k or p.top_p < 1 for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(ordered.size(-1), device=logits.device)
        ordered = ordered.masked_fill(ranks >= column([p.top_k or ordered.size(-1) for p in params]), 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered  # total probability of more likely tokens
        tail = before >= column([p.top_p if p.top_p < 1 else 2.0 for p in params])
        ordered = ordered.masked_fill(tail & (ranks > 0), 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    if any(p.min_p for p in params):
        floor = probs.amax(dim=-1, keepdim=True) * column([p.min_p for p in params])
        probs = probs.masked_fill(probs < floor, 0)
    return probs
