"""`llama-tp bench api`: what a service computes around the engine, which is replaced by a replay of known tokens."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import cycle, islice
from time import thread_time
from types import SimpleNamespace
from typing import Any, cast

from llama_tp.bench.report import finish
from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.base import Dialect
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.routes import Routes
from llama_tp.serving.service import LlamaService
from llama_tp.text.chat import chat_format
from llama_tp.text.tokenizer import load_tokenizer

TEXT = "Once upon a time, there was a lighthouse keeper who wrote down every ship that passed, and its cargo. "
BODIES: dict[str, dict[str, Any]] = {
    "": {"prompt": TEXT * 8},
    "v1/completions": {"prompt": TEXT * 8},
    "v1/chat/completions": {"messages": [{"role": "user", "content": TEXT * 8}]},
    "v1/responses": {"input": [{"role": "user", "content": TEXT * 8}]},
    "v1/messages": {"messages": [{"role": "user", "content": TEXT * 8}], "max_tokens": 1024},
}
"""By route: prompts of about 200 tokens."""


class _Replay:
    """As much of an `EngineLoop` as a service uses. Each poll advances every request by a token of a text."""

    def __init__(self, vocab_size: int, ids: list[int], new: int) -> None:
        config = SimpleNamespace(max_seq_len=4096, max_waiting=1024)
        model = SimpleNamespace(args=SimpleNamespace(vocab_size=vocab_size))
        self.engine = SimpleNamespace(config=config, runner=SimpleNamespace(model=model))
        self._answer = list(islice(cycle(ids), new))
        self._running: dict[str, Iterator[TokenEvent]] = {}

    def submit(self, *requests: Request) -> None:
        self._running |= {request.id: self._events(request.id) for request in requests}

    def cancel(self, request_id: str, index: int | None = None) -> None:
        del self._running[request_id]

    def poll(self, timeout_s: float) -> list[TokenEvent]:
        events = [event for stream in list(self._running.values()) if (event := next(stream, None)) is not None]
        for event in events:
            if event.finish_reason is not None:
                del self._running[event.request_id]
        return events

    def _events(self, request_id: str) -> Iterator[TokenEvent]:
        *others, last = self._answer
        yield from (TokenEvent(request_id, token) for token in others)
        yield TokenEvent(request_id, last, FinishReason.LENGTH)


def bench_api(tokenizer: str, *, requests: int, new: int, runs: int, plot: str | None = None) -> None:
    """Implements `llama-tp bench api`."""
    for name, value in {"requests": requests, "new": new, "runs": runs}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    words = load_tokenizer(tokenizer)
    sampling = {knob.name: knob.default for knob in KNOBS}
    defaults = RequestDefaults(mode="chat", max_new_tokens=new, seed=None, sampling=sampling)
    loop = cast(EngineLoop, _Replay(words.vocab_size, words.encode(TEXT), new))
    service = LlamaService(loop, words, chat_format("auto", words), defaults, model_name="bench")
    dialects = Routes.of(defaults, ("bench",), max_seq_len=loop.engine.config.max_seq_len).dialects
    times: dict[str, list[tuple[float, ...]]] = {route: [] for route in BODIES}
    for run in range(runs + 1):
        for route in BODIES:
            parsing = _parsing_s(dialects[route], route, requests)
            measured = (parsing, *_measure(service, route, requests=requests, new=new))
            if run:  # the first one warms up
                times[route].append(measured)
    figures = {
        route: [1e6 * statistics.median(column) for column in zip(*each, strict=True)] for route, each in times.items()
    }
    names = ("parsing", "request", "token")
    print(f"{'microseconds of CPU time per':<30}" + "".join(f"{name:>12}" for name in names))
    for route, values in figures.items():
        print(f"{route or 'native':<30}" + "".join(f"{value:>12.1f}" for value in values))
    named = {route or "native": dict(zip(names, values, strict=True)) for route, values in figures.items()}
    finish("api", {"requests": requests, "new": new, "runs": runs, "us_per": named}, plot)


def _body(route: str) -> bytes:
    return json.dumps({**BODIES[route], "stream": True}).encode()


def _parsing_s(dialect: Dialect, route: str, requests: int) -> float:
    """CPU seconds to parse and validate a body, which is part of opening a request."""
    body = _body(route)
    begun = thread_time()
    for _ in range(requests):
        dialect.parse(body)
    return (thread_time() - begun) / requests


def _measure(service: LlamaService, route: str, *, requests: int, new: int) -> tuple[float, float]:
    """CPU seconds to open a request, and to answer with a token."""
    body = _body(route)
    begun = thread_time()
    for index in range(requests):
        service.open(str(index), body, route)
    opened = thread_time()
    count = 0
    for _ in range(new):
        count += sum(reply.status == 200 for reply in service.poll(0.0))
    ended = thread_time()
    assert count == requests * new, "every token is an event"
    return (opened - begun) / requests, (ended - opened) / count
