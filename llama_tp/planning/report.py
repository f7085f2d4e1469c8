"""Estimates as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from llama_tp.parallel.sharding import heads
from llama_tp.planning.advice import Advice
from llama_tp.planning.estimate import Estimate

_BATCHES = (1, 8, 32)
"""The batch sizes for which speed is given, besides max_batch_size."""


def _batches(estimate: Estimate) -> list[int]:
    return sorted({*_BATCHES, estimate.config.max_batch_size})


def _heading(name: str, estimate: Estimate) -> str:
    args, device, config = estimate.args, estimate.device, estimate.config
    parameters = estimate.whole.parameters / 1e9
    limits = f"{config.max_batch_size} requests of {config.max_seq_len} tokens"
    return (
        f"{name}: {parameters:.2f} billion parameters, {args.n_heads} query heads, {args.n_kv_heads} kv heads, "
        f"{estimate.dtype}\n{device.name}: {_size(device.memory)}, reads {device.bandwidth / 1e9:,.0f} GB/s; {limits}, "
        f"{estimate.context} in the cache on average"
    )


def table(name: str, estimates: Sequence[Estimate]) -> Iterator[str]:
    """The lines of a table with a row for each size."""
    yield _heading(name, estimates[0])
    batches = _batches(estimates[0])
    speeds = "".join(f"{f'B={batch}':>8}" for batch in batches)
    yield ""
    yield f"{'':>6} {'busiest rank':<44} {'that fit':^19} {'ms of a':>8}  tokens/s at most, of B requests"
    columns = f"{'ranks':>6} {'weights':>10} {'of even':>8} {'KV of a token':>14} {'total':>9}"
    yield f"{columns} {'tokens':>10} {'requests':>9} {'token':>8}  {speeds.removeprefix('  ')}"
    for one in estimates:
        weights, token = _size(one.needs.weights), f"{one.needs.kv_token / 2**10:.1f} KiB"
        rates = "".join(f"{_rate(one, batch):>8}" for batch in batches)
        yield (
            f"{one.size:>6} {weights:>10} {one.unevenness:>7.2f}x {token:>14} {_size(one.total):>9}"
            f" {one.cache_tokens:>10,} {one.max_batch:>9,} {1e3 * one.step(1).seconds:>8.2f}  "
            f"{rates.removeprefix('  ')}"
        )


def _rate(estimate: Estimate, batch: int) -> str:
    """Tokens per second at this batch size; a dash if its context does not fit."""
    if batch * estimate.context > estimate.cache_tokens:
        return "-"
    return f"{estimate.step(batch).tokens_per_s:,.0f}"


def details(name: str, estimate: Estimate) -> Iterator[str]:
    """The lines that describe one size."""
    yield _heading(name, estimate)
    yield ""
    yield from (f"{label:<14}{value}" for label, value in _budget(estimate))
    yield ""
    if isinstance(estimate.ranks, tuple):
        yield from (*_of_each_rank(estimate), "")
    columns = f"{'batch':>6} {'GB a step':>10} {'GB a token':>11} {'ms a step':>10} {'tokens/s':>10}"
    yield f"{columns} {'uneven costs':>13}   bound by"
    for batch in _batches(estimate):
        step = estimate.step(batch)
        cost = f"{100 * (step.seconds / step.even_s - 1):.1f} %"
        room = "" if _rate(estimate, batch) != "-" else ", but does not fit"
        yield (
            f"{batch:>6} {step.bytes_read / 1e9:>10.2f} {step.bytes_read / batch / 1e9:>11.2f} "
            f"{1e3 * step.seconds:>10.2f} {step.tokens_per_s:>10,.0f} {cost:>13}   {step.bound}{room}"
        )


def _of_each_rank(estimate: Estimate) -> Iterator[str]:
    """A row for each rank, to compare with the devices."""
    columns = f"{'rank':>6} {'query heads':>12} {'kv heads':>9} {'weights':>10}"
    yield f"{columns} {'KV of a token':>14} {'with the KV cache':>18}"
    for rank, needs in enumerate(estimate.needs.ranks):
        segments = heads(estimate.args, estimate.ranks, rank)
        queries = sum(len(segment.queries) for segment in segments)
        held = needs.weights + estimate.config.cache_tokens * needs.kv_token
        yield (
            f"{rank:>6} {queries:>12} {len(segments):>9} {_size(needs.weights):>10} "
            f"{f'{needs.kv_token / 2**10:.1f} KiB':>14} {_size(held):>18}"
        )


def _budget(estimate: Estimate) -> list[tuple[str, str]]:
    """The memory of the busiest rank, and what ranks send each other."""
    needs, step = estimate.needs, estimate.step_memory
    verdict = "fits" if estimate.fits else "does not fit"
    reduced = f"{estimate.all_reduces} per step, of {estimate.all_reduce_bytes / 2**10:g} KiB per token"
    return [
        ("ranks", f"{estimate.size}; the busiest holds {estimate.unevenness:.3f} of an even share of the weights"),
        ("weights", f"{_size(needs.weights)}, of which a step reads {_size(needs.bytes_read(0))}"),
        ("KV cache", f"{_size(estimate.kv_cache)}, {needs.kv_token / 2**10:g} KiB per token"),
        ("largest step", f"{_size(step)} (estimate)" if step else "not counted on a CPU"),
        ("kept free", _size(estimate.reserve)),
        ("total", f"{_size(estimate.total)} of {_size(estimate.memory)}: {verdict}"),
        ("room for", f"{estimate.cache_tokens:,} tokens: {estimate.max_batch:,} requests at full length"),
        ("all-reduces", reduced if estimate.all_reduces else "none"),
    ]


def document(name: str, estimates: Sequence[Estimate], advice: Advice) -> dict[str, Any]:
    """One JSON object: sizes in bytes, times in seconds."""
    first = estimates[0]
    return {
        "model": name,
        "args": first.args.to_dict(),
        "parameters": first.whole.parameters,
        "dtype": first.dtype,
        "device": asdict(first.device),
        "max_batch_size": first.config.max_batch_size,
        "max_seq_len": first.config.max_seq_len,
        "context": first.context,
        "sizes": [_row(one) for one in estimates],
        "recommended": advice.size,
        "recommendation": advice.text,
    }


def _row(estimate: Estimate) -> dict[str, Any]:
    needs = estimate.needs
    steps = [estimate.step(batch) for batch in _batches(estimate)]
    return {
        "ranks": estimate.size,
        "weights": needs.weights,
        "weights_read": needs.bytes_read(0),
        "unevenness": estimate.unevenness,
        "kv_cache_per_token": needs.kv_token,
        "kv_cache": estimate.kv_cache,
        "step": estimate.step_memory,
        "reserve": estimate.reserve,
        "memory": estimate.memory,
        "tokens": estimate.cache_tokens,
        "requests": estimate.max_batch,
        "fits": estimate.fits,
        "all_reduces_per_step": estimate.all_reduces,
        "all_reduce_bytes_per_token": estimate.all_reduce_bytes,
        "steps": [{**asdict(one), "seconds": one.seconds, "tokens_per_s": one.tokens_per_s} for one in steps],
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
