"""The number of devices to use, and the reason, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_tp.planning.estimate import Estimate

_UNEVEN = 1.05
"""A group whose busiest rank holds this many times an even share is worth a remark."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation."""

    size: int | None
    """Devices to use; None if the model fits on none of the numbers that were considered."""
    text: str
    """One line."""


def advise(model: str, estimates: Sequence[Estimate]) -> Advice:
    """The smallest group on which max_batch_size sequences of max_seq_len fit; else the smallest on which any fits.

    `estimates`: of ascending sizes, for the same model, device and limits.
    """
    config = estimates[0].config
    asked = f"{_requests(config.max_batch_size)} of {config.max_seq_len} tokens"
    chosen = next((one for one in estimates if one.fits), None)
    if chosen is None:
        return _without_full_fit(model, estimates, asked)
    speed = f"{_speed(chosen)}{_remarks(estimates, chosen)}"
    if chosen is estimates[0]:
        return Advice(chosen.size, f"{model} fits on {_devices(chosen)} with {asked}: {speed}")
    before = estimates[estimates.index(chosen) - 1]
    room = f" (there is room for {before.max_batch})" if before.max_batch else ""
    refusal = f"{model} does not fit on {_devices(before)} with {asked}{room}"
    return Advice(chosen.size, f"{refusal}; use {chosen.size}: {speed}")


def _without_full_fit(model: str, estimates: Sequence[Estimate], asked: str) -> Advice:
    """Advice if not all sequences fit on any group."""
    best = max(estimates, key=lambda one: one.max_batch)
    refusal = f"{model} does not fit on {_devices(estimates[-1])} with {asked}"
    if best.max_batch < 1:
        remedy = "use devices with more memory, or reduce max_seq_len"
        return Advice(None, f"{refusal}, nor with one; {remedy}")
    room = f"there is room for {best.max_batch} on {_devices(best)}, and the others wait"
    return Advice(best.size, f"{refusal}; {room}: {_speed(best)}")


def _speed(estimate: Estimate) -> str:
    batch = estimate.config.max_batch_size
    one = f"at most {estimate.step(1).tokens_per_s:,.0f} tokens/s for one request"
    return one if batch == 1 else f"{one}, {estimate.step(batch).tokens_per_s:,.0f} for {batch}"


def _remarks(estimates: Sequence[Estimate], chosen: Estimate) -> str:
    remarks = ""
    if chosen.unevenness >= _UNEVEN:
        remarks = f"; the busiest rank holds {chosen.unevenness:.2f} of an even share"
        even = next((one for one in estimates if one.size > chosen.size and one.unevenness < _UNEVEN), None)
        remarks += "" if even is None else f", with {even.size} it would be {even.unevenness:.2f}"
    if chosen.size > chosen.device.per_host and not chosen.device.ranks_share_it:
        remarks += f"; a host usually has {chosen.device.per_host}, and all-reduces between hosts are slower"
    return remarks


def _devices(estimate: Estimate) -> str:
    if estimate.device.ranks_share_it:
        return f"this host with {estimate.size} rank{'s' if estimate.size > 1 else ''}"
    return f"{estimate.size} {estimate.device.name}"


def _requests(count: int) -> str:
    return f"{count} request{'s' if count != 1 else ''}"
