"""`llama-tp bench serve --url`: the load of `bench load` against a server that is already running, wherever it is.

Open loop (a rate): requests arrive whatever the server does. Closed loop (a concurrency): the next request waits until
one has been answered. The URL says what kind of server it is: a model on our TorchServe, or an OpenAI-compatible API.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

from llama_tp.bench import client
from llama_tp.bench.api import parse_apis
from llama_tp.bench.client import Target
from llama_tp.bench.machine import load_average
from llama_tp.bench.openai_server import Hints, served_by_openai
from llama_tp.bench.report import finish
from llama_tp.bench.served import Served, get_json
from llama_tp.bench.workload import (
    Load,
    Slo,
    context_of,
    describe,
    summarize,
    table,
    warm_up,
    with_other_prompts,
    workload,
)
from llama_tp.serving.access import read_key

_WARM_UP_REQUESTS = 4
_MODELS = "/1.0/v1/models"
_MODEL_PATH = re.compile(r"/predictions/[^/]+")
_EXAMPLES = (
    "http://127.0.0.1:8080/predictions/llama, or the base of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1"
)


def bench_running(
    url: str,
    load: Load,
    slo: Slo,
    *,
    api: str | None,
    runs: int,
    hints: Hints,
    api_key_file: str | None = None,
    plot: str | None = None,
) -> None:
    """Implements `llama-tp bench serve --url`. OSError, in one line, if the server refuses a request."""
    served = served_at(url, api, hints, None if api_key_file is None else read_key(api_key_file))
    shape = {"vocab_size": hints.vocab_size, "max_seq_len": context_of(served.max_seq_len)}
    print(f"{url}: {served.description}")
    print(describe(load, slo), flush=True)
    for one in served.apis:
        client.drive(warm_up(_WARM_UP_REQUESTS, **shape), served.target, one, concurrency=0)
    found: list[dict[str, dict[str, float]]] = []
    for run in range(runs):
        found.append(_one_run(served, replace(load, seed=load.seed + run), slo, **shape))
        print(f"\nRun {run + 1} of {runs}, load average of this host {load_average():.1f}")
        print(table(found[-1]), flush=True)
    medians = {one.name: statistics.median(run[one.name]["output_throughput"] for run in found) for one in served.apis}
    for name, value in medians.items():
        print(f"Output tokens per second, {name}: {value:.2f} (median of {runs} runs)")
    settings: dict[str, Any] = {"url": url, **asdict(load), **asdict(slo), "max_seq_len": served.max_seq_len}
    finish("serve", {**settings, **served.facts, "output_throughput": medians, "runs": found}, plot)


def _one_run(served: Served, load: Load, slo: Slo, *, vocab_size: int, max_seq_len: int) -> dict[str, dict[str, float]]:
    """The figures of each API, one after the other."""
    found = {}
    for index, api in enumerate(served.apis):
        jobs = with_other_prompts(
            workload(load, vocab_size=vocab_size, max_seq_len=max_seq_len), index, vocab_size=vocab_size
        )
        recorder = client.drive(jobs, served.target, api, concurrency=load.concurrency)
        found[api.name] = summarize(jobs, recorder.traces, slo)
    return found


def served_at(url: str, api: str | None, hints: Hints, api_key: str | None = None) -> Served:
    """The model behind a URL. OSError or ValueError, with the remedy, if there is none."""
    target = target_of(url, api_key)
    if _MODEL_PATH.fullmatch(target.path):
        return _served_by_torchserve(target, api or "native", hints)
    if api not in (None, "openai"):
        raise ValueError(
            f"api={api!r} is of a model on TorchServe, whose url ends with /predictions/NAME; leave it out"
        )
    return served_by_openai(target, hints)


def target_of(url: str, api_key: str | None = None) -> Target:
    """Where requests go. ValueError if this is no URL of a model or of an API."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    is_address = parts.scheme == "http" and parts.hostname and port and not (parts.query or parts.fragment)
    is_path = path and not path.endswith(("/completions", "/predictions"))
    if not (is_address and is_path):
        raise ValueError(f"url={url!r} must be a model's, such as {_EXAMPLES}")
    return Target(host=str(parts.hostname), port=port, path=path, headers=_headers(path, api_key))


def _headers(path: str, api_key: str | None) -> dict[str, str]:
    """With a key as the kind of server takes it. Authorization may be TorchServe's own."""
    if api_key is None:
        return {}
    return {"X-Api-Key": api_key} if _MODEL_PATH.fullmatch(path) else {"Authorization": f"Bearer {api_key}"}


def _served_by_torchserve(target: Target, api: str, hints: Hints) -> Served:
    for name in ("served_model", "max_seq_len", "eos_token_id"):
        if getattr(hints, name) is not None:
            raise ValueError(f"{name} is for the base URL of an OpenAI-compatible API; {target.url} needs none")
    apis = parse_apis(api)
    answer = get_json(target, _MODELS, remedy="start one with `llama-tp serve`")
    try:
        max_seq_len = int(answer["data"][0]["max_model_len"])
    except (ValueError, LookupError, TypeError):
        raise OSError(f"{target.url}{_MODELS} is not a model served by llama-tp") from None
    return Served(target=target, apis=apis, max_seq_len=max_seq_len, description=f"context of {max_seq_len} tokens")
