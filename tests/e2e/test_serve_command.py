"""`llama-tp serve SOURCE` as a user runs it: from foreign weights to answers, and to the end, with the demo."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_tp.torchserve.server import STOP_S, free_port_range
from tests.e2e.programs import program
from tests.e2e.torchserve_rig import (
    CUT_OFF,
    MARK,
    READY_WITHIN_S,
    STOPPED_WITHIN_S,
    command_of,
    free_ports,
    processes_marked,
    variables,
)
from tests.optional import imported
from tests.paths import CONFIGS
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

KEY = "sk-very-secret"
ASKED = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
NUM_LONG = 400
LONG = {**ASKED, "stream": True, "max_tokens": NUM_LONG, "ignore_eos": True, "stream_options": {"include_usage": True}}
"""Lasts for seconds: longer than it takes to send a signal and to be refused a few times."""
ENDLESS = {**LONG, "max_tokens": 1900}
"""Is ended by the test, or with the server."""
DRAIN_S = 150
"""Longer than LONG takes on the busiest machine."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@dataclass
class Command:
    """A running `llama-tp serve`, with what it has printed so far."""

    process: subprocess.Popen[str]
    port: int
    env: Mapping[str, str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def read_output(self) -> None:
        for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            threading.Thread(target=lines.extend, args=(stream,), daemon=True).start()

    @property
    def printed(self) -> str:
        return "".join(self.out)

    def wait_until_ready(self) -> None:
        ready = wait_until(lambda: "try it" in self.printed or self.process.poll() is not None, READY_WITHIN_S)
        assert ready, "".join(self.err)
        assert self.process.poll() is None, "".join(self.err)

    def ask(
        self, body: object = None, *, route: str = "v1/chat/completions", **headers: str
    ) -> http.client.HTTPResponse:
        """The response to a POST of JSON, or to a GET without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        connection.request("POST" if data else "GET", f"/predictions/llama/1.0/{route}", data, headers)
        return connection.getresponse()

    def will_say(self, text: str) -> bool:
        """Whether this is printed to stderr. It is read in a thread."""
        return wait_until(lambda: text in "".join(self.err))

    def through(self, port: int) -> Command:
        """The same server behind a proxy."""
        return replace(self, port=port)

    def children(self) -> list[psutil.Process]:
        return [one for one in processes_marked(self.env[MARK]) if one.pid != self.process.pid]


def heed_interrupts() -> None:
    """A shell that started these tests in the background has made them, and so their children, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(source: Path, folder: Path, *options: str) -> Iterator[Command]:
    port = free_port_range(3)
    with variables(LLAMA_TP_CACHE=str(folder / "cache"), LLAMA_TP_PORT=str(port)) as env:
        line = [sys.executable, "-m", "llama_tp", "serve", str(source), *options]
        process = subprocess.Popen(
            line,
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        command = Command(process, port, env)
        command.read_output()
        try:
            yield command
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE_S)


def read_stream(response: http.client.HTTPResponse, began: threading.Event, chunks: list[Any]) -> None:
    with suppress(*CUT_OFF):
        for line in response:
            if line.startswith(b"data: "):
                began.set()
                chunks.append(line[6:].strip())


def streaming(command: Command, body: Mapping[str, Any] = LONG, **headers: str) -> tuple[threading.Thread, list[bytes]]:
    """A reader of a long stream that has begun, and what it has read."""
    began, chunks = threading.Event(), []
    response = command.ask(body, **headers)
    assert response.status == 200
    reader = threading.Thread(target=read_stream, args=(response, began, chunks))
    reader.start()
    assert began.wait(PATIENCE_S)
    return reader, chunks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "key").write_text(f"{KEY}\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "serve.yaml").write_text(f"max_seq_len: 2000\nmax-batch-size: 4\nport: 1\ndrain-timeout: {DRAIN_S}\n")
    return folder


@pytest.fixture(scope="module")
def served(demo_folder: Path, folder: Path) -> Iterator[Command]:
    """From Meta's originals, with a key."""
    options = ["--api-key-file=key", "--served-model-name=smol", "--chat-template=template.jinja"]
    with started(demo_folder / "weights", folder, *options, "--config=serve.yaml") as command:
        command.wait_until_ready()
        yield command


def test_it_converts_loads_and_says_how_to_go_on(served: Command) -> None:
    assert served.will_say("generating the first token")
    told = "".join(served.err)
    steps = ["Converting ", "TorchServe is starting", "the ranks are loading the model", "generating the first token"]
    assert [step for step in steps if step in told] == steps
    base = f"http://127.0.0.1:{served.port}/predictions/llama/1.0"
    assert f"{base}/v1 (OpenAI's API; model 'smol')" in served.printed
    assert f"{base}/chat\n" in served.printed
    assert KEY not in served.printed + told


def test_the_printed_curl_line_can_be_pasted(served: Command) -> None:
    (line,) = re.findall(r"try it +(curl .*)", served.printed)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["model"] == "smol"
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_request_is_one_line_without_its_text(served: Command) -> None:
    before = len(served.out)
    response = served.ask({**ASKED, "max_tokens": 8}, Authorization=f"Bearer {KEY}")
    request_id = response.headers["x-request-id"]
    usage = json.loads(response.read())["usage"]
    assert wait_until(lambda: any(request_id in line for line in served.out[before:]))
    (line,) = [line for line in served.out[before:] if request_id in line]
    counts = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
    speed = r"TTFT \d+\.\d+ s, \d+\.\d tokens/s, total \d+\.\d+ s"
    assert re.search(rf"request {request_id} v1/chat/completions 200 (stop|length): {counts}, {speed}\n$", line)
    assert "France" not in "".join(served.out[before:])


def test_only_requests_with_the_key_are_answered(served: Command) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": f"{KEY} "[1:]}):
        for body, route in ((ASKED, "v1/chat/completions"), (ASKED, "v1/no/such"), (None, "v1/models")):
            response = served.ask(body, route=route, **headers)
            error = json.loads(response.read())["error"]
            assert (response.status, error["code"]) == (401, "invalid_api_key")
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
        response = served.ask(route="v1/models", **headers)
        (model,) = json.loads(response.read())["data"]
        assert (model["id"], model["max_model_len"]) == ("smol", 2000)
    assert served.ask(route="chat").status in (200, 404)  # not 401
    command = [sys.executable, "-m", "llama_tp", "health"]  # finds the port in LLAMA_TP_PORT, and the key
    done = subprocess.run(command, env=served.env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_official_clients_raise_their_own_error_without_the_key(served: Command) -> None:
    openai, anthropic = imported("openai"), imported("anthropic")
    url = f"http://127.0.0.1:{served.port}/predictions/llama/1.0"
    asked: dict[str, Any] = {"model": "smol", "messages": ASKED["messages"], "max_tokens": 1}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        assert client.chat.completions.create(**asked).model == "smol"
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key="wrong").chat.completions.create(**asked, stream=True)
    assert refused.value.code == "invalid_api_key"
    with anthropic.Anthropic(base_url=url, api_key=KEY) as client:
        assert client.messages.create(**asked).model == "smol"
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="wrong").messages.create(**asked)


def test_nobody_else_sees_the_key(served: Command, folder: Path) -> None:
    (kept,) = folder.rglob("api_key")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    processes = processes_marked(served.env[MARK])
    assert len(processes) > 4
    for process in processes:
        assert KEY not in " ".join(command_of(process))
    logs = [path for path in folder.rglob("*.log") if path.is_file()]
    assert logs
    assert not any(KEY in path.read_text(errors="replace") for path in logs)


@pytest.fixture(scope="module")
def proxied(served: Command, folder: Path) -> Iterator[Command]:
    """Behind nginx with configs/nginx.conf, but for its ports."""
    nginx = program("nginx", remedy="nginx is not installed; on Debian: apt install nginx-light")
    (port,) = free_ports(1)
    text = (CONFIGS / "nginx.conf").read_text()
    (folder / "nginx.conf").write_text(text.replace(":8000;", f":{port};").replace(":8080;", f":{served.port};"))
    command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        proxy = served.through(port)
        assert wait_until(lambda: is_listening(port))
        yield proxy
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}], ids=["bearer", "x-api-key"]
)
def test_nginx_passes_streams_of_openai_s_routes_as_they_come(proxied: Command, headers: dict[str, str]) -> None:
    """With buffering, everything came at the end. A busy machine may read late, but not every time."""
    assert any(comes_early(proxied, headers) for _ in range(3))


def comes_early(command: Command, headers: dict[str, str]) -> bool:
    """Whether the first chunk of a stream has come before half of its time has passed."""
    start = time.monotonic()
    response = command.ask({**LONG, "max_tokens": 60}, **headers)
    assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
    chunks = [(time.monotonic(), line) for line in response if line.startswith(b"data: ")]
    assert chunks[-1][1] == b"data: [DONE]\n"
    return chunks[0][0] - start < 0.5 * (chunks[-1][0] - start)


def test_nginx_passes_refusals_and_documents(proxied: Command) -> None:
    assert proxied.ask(ASKED).status == 401
    assert proxied.ask(route="v1/models", **{"x-api-key": KEY}).status == 200
    assert proxied.ask({"prompt": "Hi"}, route="tokenize", **{"x-api-key": KEY}).status == 200


@pytest.mark.parametrize(
    "route",
    [
        *("", "v2/models", "v1", "chat/x", "metrics", "../../../ping", "v1/../../../../ping", "v1/%2e%2e/x"),
        *("../../../models/llama", "../../../predictions/other", "openapi.json/", "retokenize"),
    ],
)
def test_nginx_passes_no_other_route(proxied: Command, route: str) -> None:
    response = proxied.ask(route=route, **{"x-api-key": KEY})
    assert response.status in (301, 404)
    assert response.status == 301 or b"no such route" in response.read()


def test_sigterm_lets_a_running_stream_finish_and_refuses_others(served: Command, proxied: Command) -> None:
    """The last of this server's tests."""
    key = {"x-api-key": KEY}
    reader, chunks = streaming(served, **key)
    endless = served.ask(ENDLESS, **key)  # until all others are refused
    served.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: served.ask({**ASKED, "max_tokens": 1}, **key).status == 503)
    for way in (served, proxied):
        refused = way.ask(ASKED, **key)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert json.loads(refused.read())["error"]["code"] == "shutting_down"
    assert served.process.poll() is None
    endless.close()
    reader.join(DRAIN_S)
    assert chunks[-1] == b"[DONE]"
    assert json.loads(chunks[-2])["usage"]["completion_tokens"] == NUM_LONG
    assert served.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert wait_until(lambda: not served.children(), STOPPED_WITHIN_S)
    assert served.will_say(f"stopping: open requests have up to {DRAIN_S} s to finish")
    assert wait_until(lambda: any("200 length: " in line and f"{NUM_LONG} out" in line for line in served.out))


def test_the_second_start_needs_no_conversion_and_a_second_ctrl_c_ends_at_once(demo_folder: Path, folder: Path) -> None:
    with started(demo_folder / "weights", folder, "--tp=1") as command:
        command.wait_until_ready()
        assert "Converting" not in "".join(command.err)
        reader, chunks = streaming(command, ENDLESS)
        command.process.send_signal(signal.SIGINT)
        assert command.will_say("press Ctrl-C again")
        before = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(PATIENCE_S) == 130
        assert time.monotonic() - before < STOP_S, "the time that its processes have otherwise"
        assert wait_until(lambda: not command.children(), STOPPED_WITHIN_S)
        reader.join(PATIENCE_S)
        assert chunks[-1] != b"[DONE]", "it has waited for the stream"


def test_in_the_background_it_is_ended_by_stop_which_drains_too(demo_folder: Path, folder: Path) -> None:
    with started(demo_folder / "converted_checkpoints", folder, "--detach", "--max-seq-len=512") as command:
        assert command.process.wait(READY_WITHIN_S) == 0, "".join(command.err)
        stop = f"llama-tp stop --port {command.port}"
        assert wait_until(lambda: stop in command.printed)
        reader, chunks = streaming(command)
        line = [sys.executable, "-m", *stop.replace("llama-tp", "llama_tp").split(), "--drain-timeout", str(DRAIN_S)]
        done = subprocess.run(
            line, env=command.env, capture_output=True, text=True, check=True, timeout=DRAIN_S + PATIENCE_S
        )
        assert done.stdout == "stopped\n"
        assert wait_until(lambda: not command.children(), STOPPED_WITHIN_S)
        reader.join(PATIENCE_S)
        assert chunks[-1] == b"[DONE]"


def test_a_command_that_is_killed_leaves_nothing_behind(demo_folder: Path, folder: Path) -> None:
    with started(demo_folder / "converted_checkpoints", folder) as command:
        assert wait_until(lambda: any("ModelServer" in " ".join(command_of(one)) for one in command.children()))
        command.process.kill()
        command.process.wait()
        assert wait_until(lambda: not command.children())
