"""`llama-tp bench quality`: how well a checkpoint predicts a fixed text, and how closely it follows another one.

The text (quality.txt: prose, dialogs and code, all in the public domain: Carroll, Austen, Lincoln, and what was written
for this purpose) is split into windows of 512 tokens, each computed without the others. Perplexity is exp of the mean
negative log probability of a token given its window up to there. The other checkpoint is the reference: reported are
the mean Kullback-Leibler divergence sum P log(P / Q) of its distribution P from the first one's Q, and how often their
most probable tokens are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from llama_tp.bench.report import finish
from llama_tp.bench.subject import EngineOptions, Subject, kernels_of
from llama_tp.engine.engine import Engine
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from llama_tp.text.tokenizer import load_tokenizer

TEXT = "quality.txt"
WINDOW = 512
MAX_STEP = 512
"""Positions computed at a time, at most: the float32 logits of a large vocabulary are megabytes for each."""
_PROMPTS, _PROMPT_TOKENS = 8, 64

Windows = list[list[int]]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one checkpoint on the text."""

    tokens: int
    """Predicted ones."""
    perplexity: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a checkpoint with a second one."""

    perplexity: float
    """The second one's."""
    kl_divergence: float
    """Mean over positions, in nats."""
    same_top_token: float
    """Share of positions."""
    greedy_prompts: int
    greedy_new: int
    """Tokens generated for each prompt."""
    same_greedy_prompts: int
    """Prompts after which all generated tokens are the same."""
    same_greedy_tokens: float
    """Tokens before the first that differs: mean over prompts."""


def bench_quality(
    checkpoint: str, options: EngineOptions, *, against: str | None, new: int, step: int, plot: str | None = None
) -> None:
    """Implements `llama-tp bench quality`."""
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ValueError(f"new={new!r} must be an integer of at least 1")
    if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= MAX_STEP:
        raise ValueError(f"step={step!r} must be an integer from 1 to {MAX_STEP}")
    config = options.config(
        max_seq_len=max(WINDOW, _PROMPT_TOKENS + new), max_batch_size=_PROMPTS, max_batched_tokens=WINDOW
    )
    paths = [checkpoint] if against is None else [checkpoint, against]
    args = [ModelArgs.load_converted(Path(path, "model_args.json")) for path in paths]
    _check_vocabulary(paths, args)
    windows = _windows(checkpoint, args[0])
    group = join(config.device, timeout_s=config.collective_timeout_s)
    if group.comm.size > 1:
        raise ValueError(f"bench quality runs on a single rank, not on {group.comm.size}; start it without torchrun")
    engines = [Subject(path, one, path).load(config, group) for path, one in zip(paths, args, strict=True)]
    quality, agreement = measure(engines, windows, new, step)
    _show(paths, engines[0], quality, agreement)
    group.comm.close()
    finish("quality", {"step": step, **_figures(paths, quality, agreement)}, plot)


def measure(engines: list[Engine], windows: Windows, new: int, step: int = 64) -> tuple[Quality, Agreement | None]:
    """engines: of the checkpoint, and of the second one if there is one. step: tokens computed at a time."""
    totals = _compare(engines, windows, step)
    tokens = sum(len(window) - 1 for window in windows)
    perplexities = [math.exp(total / tokens) for total in totals.negative_log_probs]
    quality = Quality(tokens, perplexities[0])
    if len(engines) == 1:
        return quality, None
    prompts = _prompts(windows)
    same = [
        _common_length(*tokens) for tokens in zip(*(_greedy(engine, prompts, new) for engine in engines), strict=True)
    ]
    return quality, Agreement(
        perplexity=perplexities[1],
        kl_divergence=totals.kl_divergence / tokens,
        same_top_token=totals.same_top_token / tokens,
        greedy_prompts=len(prompts),
        greedy_new=new,
        same_greedy_prompts=same.count(new),
        same_greedy_tokens=sum(same) / len(same),
    )


@dataclass(slots=True)
class _Totals:
    """Sums over positions."""

    negative_log_probs: list[float]
    """For each engine."""
    kl_divergence: float = 0.0
    same_top_token: int = 0


def _compare(engines: list[Engine], windows: Windows, step: int) -> _Totals:
    totals = _Totals([0.0] * len(engines))
    screen = Console(stderr=True)
    for window in track(windows, console=screen, transient=True, disable=not screen.is_terminal):
        for pieces in zip(*(_log_probs(engine, window, step) for engine in engines), strict=True):
            targets = pieces[0].targets
            for index, piece in enumerate(pieces):
                totals.negative_log_probs[index] -= piece.log_probs.gather(1, targets).sum(dtype=torch.float64).item()
            if len(pieces) == 2:
                ours, theirs = (piece.log_probs for piece in pieces)
                totals.kl_divergence += _kl_divergence(theirs, ours)
                totals.same_top_token += int((ours.argmax(1) == theirs.argmax(1)).sum())
    return totals


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some positions in a row."""

    log_probs: Tensor
    """(positions, V) float32, of the next token."""
    targets: Tensor
    """(positions, 1) the next token."""


@torch.inference_mode()
def _log_probs(engine: Engine, window: list[int], step: int) -> Iterator[_Piece]:
    """Of all tokens of a window but the first. Uses a table row and pages of an engine that has no requests."""
    runner = engine.runner
    assert not engine.num_requests
    for page in range(-(-len(window) // runner.config.page_size)):
        runner.page_table[0].set(page, page)
    for start in range(0, len(window) - 1, step):
        tokens = window[start : min(start + step, len(window) - 1)]
        batch = runner.prepare([Chunk(0, start, tuple(tokens), num_logits=len(tokens))]).batch
        logits, is_finite = runner.model(batch, runner.cache)
        if not is_finite.all():
            raise ValueError(
                "the model computes numbers that are not finite; use dtype=float32, or verify the checkpoint"
            )
        targets = torch.tensor(window[start + 1 : start + 1 + len(tokens)], device=runner.device)
        yield _Piece(logits.log_softmax(1), targets.unsqueeze(1))
    runner.page_table.free(0)


def _kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Sum over positions. Both are log probabilities (positions, V)."""
    return (reference.exp() * (reference - other)).sum(dtype=torch.float64).item()


def _greedy(engine: Engine, prompts: Windows, new: int) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=new, temperature=0)
    return [completion.token_ids for completion in engine.generate(prompts, params)]


def _common_length(one: list[int], two: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((index for index, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))


def _windows(checkpoint: str, args: ModelArgs) -> Windows:
    """The tokens of the text, each window with BOS in front if the model's prompts have it. What is left at the end,
    less than a window, is a window too."""
    tokenizer = load_tokenizer(checkpoint, embedding_rows=args.vocab_size)
    text = (files("llama_tp.bench") / TEXT).read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    first = tokenizer.encode("", bos=True)[:1] if tokenizer.adds_bos else []
    size = WINDOW - len(first)
    windows = [first + ids[start : start + size] for start in range(0, len(ids), size)]
    return [window for window in windows if len(window) > 1]


def _prompts(windows: Windows) -> Windows:
    """Beginnings of different parts of the text."""
    beginnings = [window[start : start + _PROMPT_TOKENS] for window in windows for start in (0, WINDOW // 2)]
    return [beginning for beginning in beginnings if len(beginning) == _PROMPT_TOKENS][:_PROMPTS]


def _check_vocabulary(paths: list[str], args: list[ModelArgs]) -> None:
    if len({one.vocab_size for one in args}) > 1:
        sizes = " and ".join(f"{path} has vocab_size={one.vocab_size}" for path, one in zip(paths, args, strict=True))
        raise ValueError(f"{sizes}: only checkpoints with the same vocabulary can be compared")


def _show(paths: list[str], engine: Engine, quality: Quality, agreement: Agreement | None) -> None:
    runner = engine.runner
    where = f"{runner.device.type}, {runner.dtype}, {kernels_of(engine)}"
    print(f"{paths[0]}: {where}; {quality.tokens} tokens in windows of {WINDOW}")
    print(f"perplexity {quality.perplexity:.4f}")
    if agreement is not None:
        print(
            f"{paths[1]}: perplexity {agreement.perplexity:.4f}\n"
            f"KL divergence from it {agreement.kl_divergence:.5f}, same most probable token at "
            f"{agreement.same_top_token:.2%} of positions\n"
            f"greedy: {agreement.same_greedy_prompts} of {agreement.greedy_prompts} prompts give the same "
            f"{agreement.greedy_new} tokens; {agreement.same_greedy_tokens:.1f} tokens are the same on average"
        )


def _figures(paths: list[str], quality: Quality, agreement: Agreement | None) -> dict[str, Any]:
    figures = {"checkpoint": paths[0], **asdict(quality)}
    return figures if agreement is None else {**figures, "against": {"checkpoint": paths[1], **asdict(agreement)}}
