"""`llama-tp bench serve --url`: the load of `bench load` against a server that is already running, wherever it is.

Open loop (a rate): requests arrive whatever the server does. Closed loop (a concurrency): the next request waits until
one has been answered.
"""

from __future__ import annotations

import json
import statistics
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

from llama_tp.bench import client
from llama_tp.bench.api import Api
from llama_tp.bench.machine import load_average
from llama_tp.bench.report import finish
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
_TIMEOUT_S = 30.0
MODELS = "/1.0/v1/models"


def bench_running(
    url: str,
    load: Load,
    slo: Slo,
    *,
    apis: Sequence[Api],
    runs: int,
    vocab_size: int,
    api_key_file: str | None = None,
    plot: str | None = None,
) -> None:
    """Implements `llama-tp bench serve --url`. OSError, in one line, if the server refuses a request."""
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size!r} must be an integer of at least 1")
    target = target_of(url, None if api_key_file is None else read_key(api_key_file))
    max_seq_len = served_context(target)
    shape = {"vocab_size": vocab_size, "max_seq_len": context_of(max_seq_len)}
    print(f"{url}: context of {max_seq_len} tokens")
    print(describe(load, slo), flush=True)
    for api in apis:
        client.drive(warm_up(_WARM_UP_REQUESTS, **shape), target, api, concurrency=0)
    found: list[dict[str, dict[str, float]]] = []
    for run in range(runs):
        this = replace(load, seed=load.seed + run)
        found.append({})
        for index, api in enumerate(apis):
            jobs = with_other_prompts(workload(this, **shape), index, vocab_size=vocab_size)
            recorder = client.drive(jobs, target, api, concurrency=load.concurrency)
            found[-1][api.name] = summarize(jobs, recorder.traces, slo)
        print(f"\nRun {run + 1} of {runs}, load average of this host {load_average():.1f}")
        print(table(found[-1]), flush=True)
    medians = {api.name: statistics.median(run[api.name]["output_throughput"] for run in found) for api in apis}
    for name, value in medians.items():
        print(f"Output tokens per second, {name}: {value:.2f} (median of {runs} runs)")
    settings: dict[str, Any] = {"url": url, **asdict(load), **asdict(slo), "max_seq_len": max_seq_len}
    finish("serve", {**settings, "output_throughput": medians, "runs": found}, plot)


def target_of(url: str, api_key: str | None = None) -> client.Target:
    """The model behind a URL. ValueError if it is none of a model on TorchServe."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port or path.count("/") != 2 or parts.query:
        raise ValueError(f"url={url!r} must be a model's, such as http://127.0.0.1:8080/predictions/llama")
    return client.Target(host=parts.hostname, port=port, path=path, api_key=api_key)


def served_context(target: client.Target) -> int:
    """The longest sequence that the model accepts. OSError, with the remedy, if the server does not say."""
    url = f"http://{target.host}:{target.port}{target.path}{MODELS}"
    headers = {} if target.api_key is None else {"X-Api-Key": target.api_key}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the load: directly
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
            return int(json.load(answer)["data"][0]["max_model_len"])
    except urllib.error.HTTPError as error:
        remedy = "; give its key by --api_key_file" if error.code == 401 else ""
        raise OSError(f"{url} answered {error.code}{remedy}") from None
    except urllib.error.URLError as error:
        raise OSError(f"no server answers at {url}: {error.reason}; start one with `llama-tp serve`") from None
    except (ValueError, LookupError, TypeError):
        raise OSError(f"{url} is not a model served by llama-tp") from None
