"""`llama-tp bench serve --url` with the base URL of an OpenAI-compatible API: the load reaches any such server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llama_tp.bench.openai_server import completions_api
from llama_tp.bench.workload import Job
from llama_tp.cli.bench_serve import serve
from tests.unit.documented_routes import DIALECTS

KEY = "secret"
VLLM = {"id": "a/model", "object": "model", "owned_by": "vllm", "max_model_len": 400}
LLAMA_CPP = {"id": "m.gguf", "object": "model", "owned_by": "llamacpp", "meta": {"n_vocab": 50, "n_ctx": 400}}
OLD_LLAMA_CPP = {"id": "m.gguf", "object": "model", "owned_by": "llamacpp", "meta": {"n_ctx_train": 8192}}
LLAMA_CPP_PYTHON = {"id": "gpt-3.5-turbo", "object": "model", "owned_by": "me", "permissions": []}


@dataclass
class Manners:
    """How a stand-in answers."""

    models: Any = field(default_factory=lambda: {"object": "list", "data": [VLLM]})
    takes_ids: bool = True
    has_usage: str = "last chunk"
    """Or "own chunk", which has no choices, or "none"."""
    framing: str = "chunked"
    """Or "length", or "connection": the body ends when it is closed."""
    separator: str = "\n\n"
    is_silent: int = 0
    """This many tokens have no text, such as the first bytes of a character."""
    finish_reason: str | None = "length"
    missing: int = 0
    """Answers are this much shorter than asked for."""
    status: int = 200
    instead: bytes | None = None
    """Sent after the first token, in place of the rest."""
    whole: bytes | None = None
    """Sent in place of a stream."""
    key: str | None = None


class StandIn(ThreadingHTTPServer):
    """A server of some manners; it remembers what it was asked."""

    def __init__(self, manners: Manners) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manners = manners
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        if self._is_refused():
            return
        answers = {"/v1/models": self.server.manners.models, "/props": {"default_generation_settings": {"n_ctx": 61}}}
        status = 200 if self.path in answers else 404
        body = answers.get(self.path, {})
        self._send(status, body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        manners = self.server.manners
        if self._is_refused():
            return
        if self.path != "/v1/completions":
            self._send(404, b"{}")
        elif manners.status != 200:
            self._send(manners.status, b'{"error": {"message": "out of\norder"}}')
        elif not (manners.takes_ids or isinstance(request["prompt"], str)):
            self._send(422, b'{"detail": "Input should be a valid string"}')
        else:
            self.server.requests.append(request)
            self._stream(manners.whole or b"".join(self._events(request)))

    def _events(self, request: dict[str, Any]) -> Iterator[bytes]:
        manners = self.server.manners
        new = request["max_tokens"] - manners.missing
        usage = {"prompt_tokens": 1, "completion_tokens": new}
        last: dict[str, Any] = {"text": "", "index": 0, "finish_reason": manners.finish_reason}
        yield b": ping" + manners.separator.encode()
        for at in range(new):
            text = "" if at < manners.is_silent else "a"
            yield self._event({"choices": [{"text": text, "index": 0, "finish_reason": None}], "usage": None})
            if manners.instead is not None:
                yield manners.instead
                return
        yield self._event({"choices": [last], **({"usage": usage} if manners.has_usage == "last chunk" else {})})
        if manners.has_usage == "own chunk":
            yield self._event({"choices": [], "usage": usage})
        yield f"data: [DONE]{manners.separator}".encode()

    def _event(self, event: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(event)}{self.server.manners.separator}".encode()

    def _stream(self, body: bytes) -> None:
        framing = self.server.manners.framing
        headers = {"chunked": ("Transfer-Encoding", "chunked"), "length": ("Content-Length", str(len(body)))}
        self.send_response(200)
        self.send_header(*headers.get(framing, ("Connection", "close")))
        self.end_headers()
        for at in range(0, len(body), 50):  # chunks end anywhere
            piece = body[at : at + 50]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if framing == "chunked" else piece)
        if framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def _is_refused(self) -> bool:
        key = self.server.manners.key
        is_refused = key is not None and self.headers["Authorization"] != f"Bearer {key}"
        if is_refused:
            self._send(401, b"{}")
        return is_refused

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def start() -> Iterator[Any]:
    servers: list[StandIn] = []

    def stand_in(**manners: Any) -> StandIn:
        servers.append(StandIn(Manners(**manners)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield stand_in
    for server in servers:
        server.shutdown()
        server.server_close()


def measure(server: StandIn, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    """The closing JSON of a load of five requests."""
    serve(url=server.url, **{"requests": 5, "runs": 1, "vocab_size": 50, **options})
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def listed(*models: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(models)}


SERVERS = {
    "vLLM": {"models": listed(VLLM), "has_usage": "own chunk"},
    "llama.cpp": {"models": listed(LLAMA_CPP), "has_usage": "last chunk"},
    "ends with the connection": {"framing": "connection"},
    "has a length": {"framing": "length", "separator": "\r\n\r\n"},
}


@pytest.mark.parametrize("server", SERVERS)
def test_every_answer_is_read_in_full(server: str, start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = start(**SERVERS[server])
    document = measure(stand_in, capsys)
    probe, *_, last = stand_in.requests
    assert len(stand_in.requests) == 1 + 4 + 5
    assert document["runs"][0]["openai"]["completed"] == 5
    tokens = sum(request["max_tokens"] for request in stand_in.requests[-5:])
    assert document["runs"][0]["openai"]["total_output_tokens"] == tokens
    assert (document["counted_by"], document["prompts"], document["max_seq_len"]) == ("usage", "token ids", 400)
    assert document["model"] == probe["model"] == last["model"] == stand_in.manners.models["data"][0]["id"]
    for request in stand_in.requests:
        assert (request["ignore_eos"], request["min_tokens"]) == (True, request["max_tokens"])
        assert all(0 <= token < 50 for token in request["prompt"])
        assert len(request["prompt"]) + request["max_tokens"] <= 400


def test_a_server_that_takes_only_text_gets_words(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = start(models=listed(LLAMA_CPP_PYTHON), takes_ids=False, has_usage="none")
    document = measure(stand_in, capsys, max_seq_len=60)
    assert (document["counted_by"], document["prompts"]) == ("chunks", "common words")
    assert len(stand_in.requests) == 1 + 4 + 5
    for request in stand_in.requests:
        assert set(request["prompt"]) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert len(request["prompt"].split()) + request["max_tokens"] < 60


@pytest.mark.parametrize("is_silent", [3, 999])
@pytest.mark.parametrize("has_usage", ["last chunk", "own chunk"])
def test_tokens_without_text_count_where_usage_is_stated(
    has_usage: str, is_silent: int, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = start(is_silent=is_silent, has_usage=has_usage)
    document = measure(stand_in, capsys)
    tokens = sum(request["max_tokens"] for request in stand_in.requests[-5:])
    assert document["runs"][0]["openai"]["total_output_tokens"] == tokens


def test_without_usage_an_answer_that_ended_by_length_may_have_fewer_chunks(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = start(is_silent=1, has_usage="none")
    document = measure(stand_in, capsys)
    tokens = sum(request["max_tokens"] - 1 for request in stand_in.requests[-5:])
    assert document["counted_by"] == "chunks"
    assert document["runs"][0]["openai"]["total_output_tokens"] == tokens


def test_the_context_of_an_older_llama_cpp_is_that_of_its_properties(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(start(models=listed(OLD_LLAMA_CPP)), capsys)["max_seq_len"] == 61


def test_one_of_several_models_is_chosen_by_name(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = start(models=listed(VLLM, {**VLLM, "id": "other"}))
    assert measure(stand_in, capsys, served_model="other")["model"] == "other"
    assert {request["model"] for request in stand_in.requests} == {"other"}
    with pytest.raises(ValueError, match=r"serves a/model, other; choose one by --served_model"):
        serve(url=stand_in.url)
    with pytest.raises(ValueError, match=r"served_model='c' must be one of those at .*: a/model, other"):
        serve(url=stand_in.url, served_model="c")


def test_a_key_is_sent_as_a_bearer(start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text(KEY)
    stand_in = start(key=KEY)
    assert measure(stand_in, capsys, api_key_file=str(tmp_path / "key"))["model"] == "a/model"
    with pytest.raises(OSError, match=r"/v1/models answered 401; give its key by --api_key_file"):
        serve(url=stand_in.url)


def test_an_end_token_is_forbidden_on_request(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = start()
    measure(stand_in, capsys, eos_token_id=2)
    assert [request["logit_bias"] for request in stand_in.requests] == [{"2": -100}] * 10


ERROR = {"error": {"message": "out of memory", "type": "server_error", "code": 500}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stopped": (
        {"missing": 1, "finish_reason": "stop"},
        r"/v1/completions: an answer has 7 of 8 tokens, counted by usage, .*stop.*or give --eos_token_id$",
    ),
    "stopped, uncounted": (
        {"missing": 1, "finish_reason": "stop", "has_usage": "none"},
        r"/v1/completions: an answer has 7 of 8 tokens, counted by chunks",
    ),
    "interrupted": (
        {"instead": b"data: [DONE]\n\n", "has_usage": "none"},
        r"/v1/completions: an answer has 1 of 8 tokens, .* finish_reason null; .* ends no answer because others wait",
    ),
    "longer": ({"missing": -1}, r"an answer has 9 of 8 tokens"),
    "empty": ({"is_silent": 999, "has_usage": "none"}, r"an answer has 0 of 8 tokens"),
    "error in the stream": (
        {"instead": b"data: " + json.dumps(ERROR).encode() + b"\n\n"},
        r"/v1/completions: the server aborted a stream: .*out of memory",
    ),
    "error as llama.cpp's": (
        {"instead": b"error: " + json.dumps(ERROR["error"]).encode() + b"\n\n"},
        r"/v1/completions: the server aborted a stream: .*out of memory",
    ),
    "error in place of a stream": (
        {"whole": json.dumps(ERROR).encode()},
        r"/v1/completions: the server aborted a stream: .*out of memory",
    ),
    "no stream": (
        {"whole": b'{"choices": [{"text": "whole"}]}'},
        r"/v1/completions: the answer is no stream of events, but ",
    ),
    "no JSON": (
        {"instead": b"data: {oops\n\n"},
        r"/v1/completions: the answer has a line that is no JSON object: '{oops'",
    ),
    "status": ({"status": 503}, r'/v1/completions answered 503: {"error": {"message": "out of order"}}$'),
    "neither ids nor text": ({"status": 400}, r"/v1/completions answered 400: "),
    "context": ({"models": listed(LLAMA_CPP_PYTHON)}, r"/v1/models does not say .*; give --max_seq_len"),
    "no list": ({"models": {"models": []}}, r"/v1/models is not a list of OpenAI's API; give --url as"),
    "a page": ({"models": b"<html>"}, r"/v1/models answered something that is not JSON; give --url as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_told_in_one_line(case: str, start: Any) -> None:
    manners, words = REFUSED[case]
    with pytest.raises(OSError, match=words) as raised:
        serve(url=start(**manners).url, requests=2, runs=1, vocab_size=50)
    assert "\n" not in str(raised.value)


def test_what_is_no_base_url_gets_a_remedy(start: Any) -> None:
    url = start().url.replace("/v1", "/api")
    with pytest.raises(
        OSError, match=r"/api/models answered 404; give --url as OpenAI's clients take base_url, such as"
    ):
        serve(url=url)
    with pytest.raises(OSError, match=r"no server answers at http://127\.0\.0\.1:9/v1/models: .*; give --url as"):
        serve(url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 51}, "vocab_size=51 must be at most 50, the vocabulary of m.gguf"),
        ({"max_seq_len": 5}, "max_seq_len=5 must be an integer of at least 18"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be an integer of at least 0"),
        ({"api": "native"}, "api='native' is of a model on TorchServe"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], words: str, start: Any) -> None:
    with pytest.raises(ValueError, match=words):
        serve(url=start(models=listed(LLAMA_CPP)).url, **{"vocab_size": 50, **options})


def test_our_own_server_takes_the_request_of_this_api() -> None:
    body = json.dumps(completions_api("llama").fields(Job(0.0, (5, 6), 7))).encode()
    request = DIALECTS["v1/completions"].parse(body)
    assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (7, 7)
