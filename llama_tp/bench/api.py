"""The APIs that the load generator speaks, and how to read their streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from llama_tp.bench.workload import Job

GREEDY = {"temperature": 0, "stream": True, "ignore_eos": True}
_DATA = b"data:"
_DONE = b"[DONE]"


class Answer(Protocol):
    """One answer, read line by line."""

    def read(self, line: bytes) -> int:
        """The number of tokens that are new with this line. OSError if the line is an error."""

    def complete(self, asked: int) -> int:
        """The number of tokens of the whole answer. OSError if it is not the number asked for."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: how to ask for a stream that ends only by length, and how to read it."""

    name: str
    route: str
    """Below the path of the target."""
    fields: Callable[[Job], dict[str, Any]]
    """The body of a job's request."""
    answer: Callable[[], Answer]
    """Reads the answer to one request."""


class NativeAnswer:
    """Lines of JSON with the ids of new tokens."""

    def __init__(self) -> None:
        self._seen = 0

    def read(self, line: bytes) -> int:
        count = len(_record(line)["ids"]) if line else 0
        self._seen += count
        return count

    def complete(self, asked: int) -> int:
        if self._seen != asked:
            raise OSError(f"an answer has {self._seen} of {asked} tokens")
        return self._seen


class OpenAIAnswer:
    """Server-sent events of `completions`, from any server.

    The last `usage` says how many tokens the answer has. Without one, ids count if there are any, else every chunk of
    text counts as a token. Then an answer is complete if it ended by length: a server that holds back the bytes of an
    incomplete character sends fewer chunks than tokens.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._stated: int | None = None
        self._has_ids = False
        self._finish_reason: str | None = None

    @property
    def counted_by(self) -> str:
        """usage, token ids or chunks."""
        return "usage" if self._stated is not None else "token ids" if self._has_ids else "chunks"

    def read(self, line: bytes) -> int:
        data = _event_data(line)
        if data in (b"", _DONE):
            return 0
        event = _record(data)
        count = sum(self._tokens_of(choice) for choice in event.get("choices", ()))
        if usage := event.get("usage"):
            self._stated = int(usage["completion_tokens"])
            count = max(count, self._stated - self._seen)  # the rest had no text of its own
        self._seen += count
        return count

    def complete(self, asked: int) -> int:
        total = self._seen if self._stated is None else self._stated
        is_exact = self._stated is not None or self._has_ids
        is_whole = total == asked if is_exact else self._finish_reason == "length" or total >= asked
        if not (is_whole and self._seen):
            raise OSError(
                f"an answer has {total} of {asked} tokens, counted by {self.counted_by}, and finish_reason "
                f"{json.dumps(self._finish_reason)}; answers must end only by length: use a server that follows "
                "ignore_eos or min_tokens and ends no answer because others wait, or give --eos_token_id"
            )
        return total

    def _tokens_of(self, choice: dict[str, Any]) -> int:
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        ids = choice.get("token_ids")
        if ids is None:
            return int(bool(choice.get("text")))
        self._has_ids = True
        return len(ids)


def _event_data(line: bytes) -> bytes:
    """The data in a line of server-sent events; empty for other fields, comments, and the line between two events.

    OSError for JSON that is no event: an error, or an answer in one piece.
    """
    line = line.rstrip(b"\r")
    if line.startswith(_DATA):
        return line[len(_DATA) :].strip()
    if line.startswith(b"error:"):  # llama.cpp's, until 2025
        return b'{"error": %s}' % line[len(b"error:") :]
    if line.startswith(b"{"):
        _record(line)
        raise OSError(f"the answer is no stream of events, but {_shown(line)}")
    return b""


def _record(line: bytes) -> dict[str, Any]:
    """A JSON object in a stream. OSError if it is none, or an error."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise OSError(f"the answer has a line that is no JSON object: {_shown(line)}")
    if error := record.get("error"):
        raise OSError(f"the server aborted a stream: {error}")
    return record


def _shown(line: bytes) -> str:
    return repr(line[:120].decode(errors="replace"))


def _native_fields(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt, "max_new_tokens": job.new, **GREEDY}


def _openai_fields(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt, "max_tokens": job.new, "return_token_ids": True, **GREEDY}


APIS = {
    "native": Api("native", "", _native_fields, NativeAnswer),
    "openai": Api("openai", "/1.0/v1/completions", _openai_fields, OpenAIAnswer),
}
"""Of a model on our TorchServe. Prompts are token ids in each, so that all have the same work."""


def parse_apis(names: object) -> list[Api]:
    """From a name, or several separated by commas."""
    given = names.split(",") if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not given or not all(name in APIS for name in given):
        raise ValueError(f"api={names!r} must be one or several of {', '.join(APIS)}, separated by commas")
    return [APIS[name] for name in dict.fromkeys(given)]
