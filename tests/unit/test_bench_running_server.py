"""`llama-tp bench serve --url`: the load reaches a server that is already running, open- and closed-loop."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama_tp.bench.running_server import target_of
from llama_tp.cli.bench_serve import serve
from tests.waiting import PATIENCE_S

KEY = "secret"


class Server(ThreadingHTTPServer):
    """Answers like a model that streams its tokens, and remembers what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prompts, self.active, self.most_after_warm_up, self.at_once = [], 0, 0, 1
        """at_once: after the warm-up, every answer waits until this many requests are open, at most PATIENCE_S."""
        self.changed = threading.Condition()
        self.url = f"http://127.0.0.1:{self.server_port}/predictions/tiny"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        assert self.path == "/predictions/tiny/1.0/v1/models"
        if self.headers["X-Api-Key"] != KEY:
            self._answer(401, b"{}")
            return
        self._answer(200, json.dumps({"data": [{"id": "tiny", "max_model_len": 40}]}).encode())

    def do_POST(self):
        assert self.headers["X-Api-Key"] == KEY
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.changed:
            server.prompts.append(request["prompt"])
            server.active += 1
            if len(server.prompts) > 4:
                server.most_after_warm_up = max(server.most_after_warm_up, server.active)
                server.changed.notify_all()
                server.changed.wait_for(lambda: server.most_after_warm_up >= server.at_once, PATIENCE_S)
        lines = [json.dumps({"ids": [7]}) for _ in range(request["max_new_tokens"])]
        self._answer(200, "".join(f"{line}\n" for line in lines).encode(), before=self._leave)

    def _leave(self):
        with self.server.changed:
            self.server.active -= 1

    def _answer(self, status, body, before=lambda: None):
        before()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def key_file(tmp_path):
    (tmp_path / "key").write_text(KEY)
    return str(tmp_path / "key")


def figures(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_request_is_answered_in_full_and_fits_the_served_context(server, key_file, capsys):
    serve(url=server.url, requests=12, runs=2, vocab_size=50, api_key_file=key_file)
    document = figures(capsys)
    assert [run["native"]["completed"] for run in document["runs"]] == [12, 12]
    assert document["max_seq_len"] == 40
    assert len(server.prompts) == 4 + 2 * 12
    assert all(0 <= token < 50 for prompt in server.prompts for token in prompt)
    assert max(map(len, server.prompts)) < 40
    assert document["output_throughput"]["native"] > 0


def test_a_closed_loop_keeps_no_more_requests_in_flight_than_it_should(server, key_file, capsys):
    server.at_once = 2
    serve(url=server.url, requests=8, runs=1, concurrency=2, vocab_size=50, api_key_file=key_file)
    assert figures(capsys)["concurrency"] == 2
    assert server.most_after_warm_up == 2


def test_an_open_loop_sends_what_arrives_however_slow_the_server_is(server, key_file, capsys):
    server.at_once = 8
    serve(url=server.url, requests=8, runs=1, rate=200, vocab_size=50, api_key_file=key_file)
    assert figures(capsys)["rate"] == 200
    assert server.most_after_warm_up == 8


def test_a_server_with_a_key_says_so(server):
    with pytest.raises(OSError, match="answered 401; give its key by --api_key_file"):
        serve(url=server.url)


def test_where_no_server_is_it_is_said_how_to_start_one():
    with pytest.raises(
        OSError, match=r"no server answers at http://127\.0\.0\.1:9/.*; start one with `llama-tp serve`"
    ):
        serve(url="http://127.0.0.1:9/predictions/llama")


@pytest.mark.parametrize(
    "url",
    [
        *("https://a:1/predictions/m", "http://a:1", "http://a:1/predictions", "http://a:b/predictions/m", "a"),
        *("http://a:1/v1/completions", "http://a:1/v1?key=1", "http://:1/v1"),
    ],
)
def test_what_is_no_url_of_a_model_is_refused(url):
    with pytest.raises(ValueError, match=r"must be a model's, such as http://127.0.0.1:8080/predictions/llama"):
        target_of(url)


def test_a_model_behind_another_name_and_port_is_found():
    target = target_of("http://host:81/predictions/m/")
    assert (target.host, target.port, target.path) == ("host", 81, "/predictions/m")


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://[::1]:81/v1/", {"Authorization": "Bearer secret"}),
        ("http://[::1]:81/predictions/m/1.0/v1", {"Authorization": "Bearer secret"}),
        ("http://[::1]:81/predictions/m", {"X-Api-Key": "secret"}),
    ],
)
def test_a_key_is_sent_as_the_kind_of_server_takes_it(url, headers):
    target = target_of(url, KEY)
    assert (target.host, target.url, target.headers) == ("::1", url.rstrip("/"), headers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give a converted checkpoint, or the --url of a running server"),
        ({"url": "http://a:1/predictions/m", "checkpoint": "c"}, "leave the checkpoint c out"),
        ({"url": "http://a:1/predictions/m", "vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
        ({"url": "http://a:1/predictions/m", "runs": 0}, "runs=0 must be an integer of at least 1"),
        ({"url": "http://a:1/predictions/m", "api": "grpc"}, "api='grpc' must be one or several of native, openai"),
        ({"url": "http://a:1/predictions/m", "max_seq_len": 99}, "max_seq_len is for the base URL of an OpenAI"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        serve(**settings)
