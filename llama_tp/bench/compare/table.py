"""The tables of a comparison: tokens per second, and ratios of ours to the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_tp.bench.compare.rounds import Round
from llama_tp.bench.neighbour import BESIDE, IDLE

_WIDTH = 14


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one contender."""

    name: str
    is_ours: bool
    version: str
    failure: str | None
    tokens_per_s: Mapping[str, Mapping[str, float]]
    """Medians by condition and case."""
    by_round: Mapping[str, Mapping[str, Sequence[float]]]
    first_tokens: tuple[int, ...]
    """After the first prompt, which all contenders had."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of ours to another contender: the median of the ratios in each round."""

    ours: str
    theirs: str
    condition: str
    case: str
    ratio: float


def show(results: Sequence[Result], cases: Sequence[str], rounds: Sequence[Round], kept: Sequence[int]) -> list[Ratio]:
    """Print everything; returns the ratios."""
    left_out = [str(index + 1) for index in range(len(rounds)) if index not in kept]
    if left_out:
        print(f"Disturbed by other processes, and repeated: round {', '.join(left_out)}")
    conditions = [name for name in (IDLE, BESIDE) if any(name in result.tokens_per_s for result in results)]
    ratios = []
    for condition in conditions or [IDLE]:
        suffix = ", beside a busy process" if condition == BESIDE else ""
        _print_rates(f"tokens/s{suffix}", results, cases, condition)
        found = [
            ratio
            for ours in results
            for theirs in results
            if ours.is_ours and not theirs.is_ours
            for ratio in _ratios(ours, theirs, cases, condition)
        ]
        _print_ratios(f"ours / theirs{suffix}", found, cases)
        ratios += found
    if BESIDE in conditions:
        _print_slowdown(results, cases)
    return ratios


def _print_rates(title: str, results: Sequence[Result], cases: Sequence[str], condition: str) -> None:
    print(f"\n{title:<40}" + "".join(f"{case:>{_WIDTH}}" for case in cases))
    for result in results:
        label = f"{result.name} ({result.version})" if result.version else result.name
        if result.failure is not None:
            print(f"{label:<40}  {result.failure}")
        else:
            rates = result.tokens_per_s[condition]
            print(f"{label:<40}" + "".join(f"{rates[case]:>{_WIDTH}.1f}" for case in cases))


def _ratios(ours: Result, theirs: Result, cases: Sequence[str], condition: str) -> list[Ratio]:
    if ours.failure is not None or theirs.failure is not None:
        return []
    pairs = {case: zip(ours.by_round[condition][case], theirs.by_round[condition][case], strict=True) for case in cases}
    return [
        Ratio(ours.name, theirs.name, condition, case, statistics.median(a / b for a, b in pairs[case]))
        for case in cases
    ]


def _print_ratios(title: str, ratios: Sequence[Ratio], cases: Sequence[str]) -> None:
    if not ratios:
        return
    print(f"\n{title:<40}" + "".join(f"{case:>{_WIDTH}}" for case in cases))
    for start in range(0, len(ratios), len(cases)):
        row = ratios[start : start + len(cases)]
        print(f"{row[0].ours + ' / ' + row[0].theirs:<40}" + "".join(f"{one.ratio:>{_WIDTH}.2f}" for one in row))


def _print_slowdown(results: Sequence[Result], cases: Sequence[str]) -> None:
    print(f"\n{'beside / idle':<40}" + "".join(f"{case:>{_WIDTH}}" for case in cases))
    for result in results:
        if result.failure is None:
            idle, beside = result.tokens_per_s[IDLE], result.tokens_per_s[BESIDE]
            print(f"{result.name:<40}" + "".join(f"{beside[case] / idle[case]:>{_WIDTH}.2f}" for case in cases))
