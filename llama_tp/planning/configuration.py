"""Write model-config.yaml for an estimate, from the one that comes with the package: its comments stay."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from llama_tp.planning.estimate import Estimate
from llama_tp.resources import resource

_TEMPLATE = "configs/llama2-7b.yaml"
_LOAD_BYTES_PER_S = 40e6
"""The slowest storage that startupTimeout allows for. The shipped configurations allow as much."""
_MIN_STARTUP_S = 1200


def configuration(estimate: Estimate, *, model: str, tokenizer: str, threads: int) -> str:
    """The text of a model-config.yaml. `tokenizer`: file name of the tokenizer; `threads`: CPU threads of each rank."""
    text = resource(_TEMPLATE).read_text(encoding="utf-8")
    text = re.sub(r"\A.*\n", f"# Configuration of TorchServe and the handler for {_title(estimate, model)}.\n", text)
    for key, value in _values(estimate, tokenizer, threads).items():
        text = _set(text, key, value)
    return text


def write_configuration(text: str, path: str | Path, *, overwrite: bool) -> None:
    """ValueError if the file exists and may not be overwritten."""
    try:
        with Path(path).open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"write={str(path)!r} exists already; pass --overwrite to replace it") from None


def _values(estimate: Estimate, tokenizer: str, threads: int) -> dict[str, object]:
    config, is_cpu = estimate.config, estimate.device.type == "cpu"
    # A GPU is the ranks' alone: what sequences leave of the cache keeps prefixes. A host has other uses for its memory.
    cache: object = f"{math.ceil(estimate.kv_cache / 2**20)}MiB" if is_cpu else 0.9
    if is_cpu and not estimate.fits:
        cache = f"{estimate.cache_tokens * estimate.needs.kv_token // 2**20}MiB"
    return {
        "batchSize": config.max_batch_size,
        "startupTimeout": max(_MIN_STARTUP_S, 60 * math.ceil(estimate.whole.weights / _LOAD_BYTES_PER_S / 60)),
        "deviceType": "cpu" if is_cpu else "gpu",
        "nproc-per-node": estimate.size,
        "OMP_NUMBER_THREADS": threads,
        "tokenizer_path": tokenizer,
        "max_seq_len": config.max_seq_len,
        "max_batch_size": config.max_batch_size,
        "max_batched_tokens": config.max_batched_tokens,
        "kv_cache_memory": cache,
        "dtype": estimate.dtype,
        "tp_shares": estimate.ranks if isinstance(estimate.ranks, tuple) else None,
    }


def _set(text: str, key: str, value: object) -> str:
    """The text with another value of a key, and its comment in the same column where possible."""
    pattern = re.compile(rf"^(\s*{re.escape(key)}: )(\S+)( *)(?=#|$)", re.MULTILINE)

    def replace(match: re.Match[str]) -> str:
        new = json.dumps(value)
        padding = " " * max(2, len(match[2]) + len(match[3]) - len(new)) if match[3] else ""
        return f"{match[1]}{new}{padding}"

    text, count = pattern.subn(replace, text)
    assert count == 1, key
    return text


def _title(estimate: Estimate, model: str) -> str:
    place = "this host's CPUs" if estimate.device.ranks_share_it else f"{estimate.size} x {estimate.device.name}"
    return f"{model} on {place} ({estimate.needs.weights / 1e9:.1f} GB of weights each in {estimate.dtype})"
