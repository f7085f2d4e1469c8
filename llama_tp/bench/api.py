"""The APIs that the load generator speaks. Prompts are token ids in each, so that all have the same work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_tp.bench.workload import Job

_GREEDY = {"temperature": 0, "stream": True, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Api:
    """One API: how to ask for a stream that ends only by length, and how to read it."""

    name: str
    route: str
    """Below /predictions/<model>."""
    fields: Callable[[Job], dict[str, Any]]
    """The body of a job's request."""
    num_tokens: Callable[[bytes], int]
    """New tokens in a line of the stream. OSError if the line is an error."""


def _native_fields(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt, "max_new_tokens": job.new, **_GREEDY}


def _openai_fields(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt, "max_tokens": job.new, "return_token_ids": True, **_GREEDY}


def _native_tokens(line: bytes) -> int:
    return len(_record(line)["ids"])


def _openai_tokens(line: bytes) -> int:
    """Lines between events are empty, and the last event is not JSON."""
    data = line.removeprefix(b"data: ")
    if data in (b"", b"[DONE]"):
        return 0
    return sum(len(choice.get("token_ids", ())) for choice in _record(data)["choices"])


def _record(line: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    if "error" in record:
        raise OSError(f"the server aborted a stream: {record['error']}")
    return record


APIS = {
    "native": Api("native", "", _native_fields, _native_tokens),
    "openai": Api("openai", "/1.0/v1/completions", _openai_fields, _openai_tokens),
}


def parse_apis(names: object) -> list[Api]:
    """From a name, or several separated by commas."""
    given = names.split(",") if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not given or not all(name in APIS for name in given):
        raise ValueError(f"api={names!r} must be one or several of {', '.join(APIS)}, separated by commas")
    return [APIS[name] for name in dict.fromkeys(given)]
