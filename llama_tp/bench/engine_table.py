"""The table of `llama-tp bench engine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_tp.bench.ceilings import Ceilings
from llama_tp.bench.neighbour import BESIDE, IDLE

if TYPE_CHECKING:
    from llama_tp.bench.engine import Row


def show(rows: Sequence[Row], ceilings: Ceilings, peak_bytes: int, notes: Sequence[str]) -> None:
    """Print contenders by batch size and context, with the ratios of ours to the others, and the gain from batching."""
    print(ceilings)
    print(
        f"{'':<18}{'batch':>6}{'context':>9}{'prefill tok/s':>15}{'of GEMM':>9}{'decode tok/s':>14}{'of read':>9}"
        f"{'step p50':>10}{'p99 ms':>9}"
    )
    for group in _groups(rows):
        ours = group[0]
        for row in group:
            print(_line(row))
        for row in group[1:]:
            prefill = _ratio(ours.prefill_tokens_per_s, row.prefill_tokens_per_s)
            decode = ours.decode_tokens_per_s / row.decode_tokens_per_s
            if row.contender != ours.contender and row.condition == IDLE:
                print(_ratio_line("  ratio", row, prefill, decode))
            elif row.contender == ours.contender:
                print(_ratio_line("  beside / idle", row, _inverse(prefill), 1 / decode))
    print(f"peak memory {peak_bytes / 1e6:.0f} MB")
    first, last = rows[0], _largest(rows)
    if last.batch > first.batch:
        gain = last.decode_tokens_per_s / first.decode_tokens_per_s
        print(f"batch {last.batch} decodes {gain:.2f} times as many tokens per second as batch {first.batch}")
    for note in notes:
        print(f"Note: {note}")


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same batch size and context, ours first."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.batch, row.context), []).append(row)
    return list(groups.values())


def _largest(rows: Sequence[Row]) -> Row:
    """Ours at the largest batch, in the context of the first row."""
    first = rows[0]
    same = [
        row for row in rows if (row.contender, row.condition, row.context) == (first.contender, IDLE, first.context)
    ]
    return max(same, key=lambda row: row.batch)


def _line(row: Row) -> str:
    name = f"{row.contender} ({BESIDE})" if row.condition == BESIDE else row.contender
    prefill = f"{'':>15}{'':>9}"
    if row.prefill_tokens_per_s is not None and row.prefill_share is not None:
        prefill = f"{row.prefill_tokens_per_s:>15.2f}{row.prefill_share:>9.1%}"
    return (
        f"{name:<18}{row.batch:>6}{row.context:>9}{prefill}{row.decode_tokens_per_s:>14.2f}{row.decode_share:>9.1%}"
        f"{row.step_p50_ms:>10.2f}{row.step_p99_ms:>9.2f}"
    )


def _ratio_line(name: str, row: Row, prefill: float | None, decode: float) -> str:
    return f"{name:<18}{row.batch:>6}{row.context:>9}{_number(prefill):>15}{'':>9}{decode:>14.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value
