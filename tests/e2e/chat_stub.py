"""A server of the chat page whose answers are scripted by the test: the page's logic needs no model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llama_tp.serving.page.assembly import chat_page
from tests.waiting import PATIENCE_S

PATH = "/predictions/llama/1.0"
MODEL = {"id": "llama", "object": "model", "max_model_len": 2048}


@dataclass(frozen=True)
class Answer:
    """What the stub sends for one request: pieces of a body as they are, waiting for events and seconds among them."""

    pieces: Iterable[bytes | threading.Event | float]
    status: int = 200
    content_type: str = "text/event-stream"
    breaks_off: bool = False
    """Close the connection before the end of the body."""


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def delta(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}], "usage": None})


def usage(tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 37, "completion_tokens": tokens}}) + b"data: [DONE]\n\n"


def streamed(*texts: str, finish_reason: str = "stop") -> Answer:
    """A complete stream: one event per text."""
    return Answer([*map(delta, texts), delta("", finish_reason), usage(len(texts))])


def refused(status: int, body: object) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer([raw], status, "application/json")


@dataclass
class Stub:
    """The server's script, and what it has seen."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    """For the next requests, in order; after them, every request is answered with "Fine."."""
    model: Answer = field(default_factory=lambda: refused(200, {"data": [MODEL]}))
    token: str | None = None
    """If set, requests without it are refused as by TorchServe. The page itself is not."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of the requests for answers."""
    paths: list[str] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)
    """A client has left in the middle of an answer."""

    @property
    def dialog(self) -> list[tuple[str, str]]:
        """The messages of the last request."""
        return [(message["role"], message["content"]) for message in self.requests[-1]["messages"]]


INVALID_TOKEN = {
    "code": 400,
    "type": "InvalidKeyException",
    "message": "Token Authorization failed. Token either incorrect, expired, or not provided correctly",
}


@contextmanager
def serve_stub() -> Iterator[Stub]:
    stub = Stub()
    page = chat_page()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            stub.paths.append(self.path)
            if self.path.partition("?")[0] == f"{PATH}/chat":
                self.send_response(200)
                self.send_header("content-type", page.content_type)
                self.send_header("content-length", str(len(page.body)))
                for name, value in page.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(page.body)
            elif self.path == f"{PATH}/v1/models":
                self.send(stub.model if self.is_admitted() else refused(400, INVALID_TOKEN))
            else:
                self.send(refused(404, {}))

        def do_POST(self) -> None:
            stub.paths.append(self.path)
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.is_admitted():
                self.send(refused(400, INVALID_TOKEN))
                return
            stub.requests.append(body)
            self.send(stub.answers.pop(0) if stub.answers else streamed("Fine."))

        def is_admitted(self) -> bool:
            return stub.token is None or self.headers["authorization"] == f"Bearer {stub.token}"

        def send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("content-type", answer.content_type)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            try:
                for piece in answer.pieces:
                    if isinstance(piece, threading.Event):
                        piece.wait(PATIENCE_S)
                    elif isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if not answer.breaks_off:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:
                stub.disconnected.set()
            self.close_connection = answer.breaks_off

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        stub.url = f"http://127.0.0.1:{server.server_port}{PATH}/chat"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield stub
        finally:
            server.shutdown()
