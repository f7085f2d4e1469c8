"""Before TorchServe is started: what the operator said is kept or refused by name. Beside it: its log, its health."""

from __future__ import annotations

import json
import locale
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llama_tp.checkpoint.load_progress import READ
from llama_tp.torchserve import environment
from llama_tp.torchserve.client import Client
from llama_tp.torchserve.environment import frontend_environment, private_folder
from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.processes import MARK, find_frontend, is_alive
from llama_tp.torchserve.progress import LogTail, StartupProgress
from llama_tp.torchserve.properties import Address, Properties, parse_properties
from llama_tp.torchserve.server import TorchServe, free_port_range, stop_server, why_unhealthy
from tests.paths import CONFIGS, ROOT
from tests.waiting import wait_until


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A TorchServe that is not started, with these lines in its properties."""
    monkeypatch.delenv("LOG_LOCATION", raising=False)

    def make(*lines, model_config=None, **arguments):
        folder = tmp_path / "model_store" / "llama"
        (folder / "MAR-INF").mkdir(parents=True, exist_ok=True)
        (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"configFile": "my.yaml"}}))
        (folder / "my.yaml").write_text(model_config or "torchrun: {nproc-per-node: 2}")
        (tmp_path / "own.properties").write_text("".join(f"{line}\n" for line in lines))
        defaults = {
            "model_store": tmp_path / "model_store",
            "model_name": "llama",
            "run_dir": tmp_path / "run",
            "properties": tmp_path / "own.properties",
            "log_config": CONFIGS / "log4j2.xml",
        }
        return TorchServe(**{**defaults, **arguments})

    return make


@pytest.fixture
def started(monkeypatch):
    """What `start` would run: commands and environments, which it is told have failed."""
    runs = []

    def run(command, env, **_):
        runs.append((command, env))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("llama_tp.torchserve.server.subprocess.run", run)
    monkeypatch.setattr(environment, "java_home", lambda: None)
    return runs


def properties_of(server, started):
    """What TorchServe would read."""
    with pytest.raises(ServerError, match="torchserve did not start"):
        server.start()
    command, _ = started[-1]
    return parse_properties(Path(command[command.index("--ts-config") + 1]).read_text())


# --- where it listens


def test_without_a_word_it_listens_on_loopback_from_port_8080(make):
    assert [str(one) for one in make().listeners] == [
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8081",
        "http://127.0.0.1:8082",
    ]


def test_host_and_port_are_those_of_the_inference_api_and_nothing_else_leaves_the_host(make):
    server = make(host="0.0.0.0", port=9000)
    assert [str(one) for one in server.listeners] == [
        "http://0.0.0.0:9000",
        "http://127.0.0.1:9001",
        "http://127.0.0.1:9002",
    ]
    assert server.url == "http://127.0.0.1:9000/predictions/llama"


@pytest.mark.parametrize(
    ("tokens", "host", "expected"),
    [
        ("true", "0.0.0.0", True),
        ("true", "127.0.0.9", False),
        ("true", "localhost", False),
        ("false", "0.0.0.0", False),
    ],
)
def test_a_server_that_anyone_may_use_is_known_as_such(make, tokens, host, expected):
    assert make(f"disable_token_authorization={tokens}", host=host).is_open is expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_the_properties_say_reaches_torchserve(make, started):
    """inference_address was replaced by 127.0.0.1, the gRPC ports and initial_distribution_port by others."""
    own = {
        "inference_address": f"http://127.0.0.9:{free_port()}",
        "management_address": f"http://127.0.0.8:{free_port()}",
        "metrics_address": f"http://127.0.0.7:{free_port()}",
        "grpc_inference_port": "7777",
        "grpc_management_port": "7778",
        "initial_distribution_port": "7779",
        "metrics_config": "/srv/metrics.yaml",
    }
    server = make(*(f"{key}={value}" for key, value in own.items()), "number_of_netty_threads=3")
    assert properties_of(server, started) == {**own, "number_of_netty_threads": "3"}


def test_what_the_properties_leave_open_is_added(make, started):
    port = free_port_range(3)
    found = properties_of(make("cors_allowed_origin=*", port=port), started)
    assert found["inference_address"] == f"http://127.0.0.1:{port}"
    assert found["management_address"] == f"http://127.0.0.1:{port + 1}"
    assert found["cors_allowed_origin"] == "*"
    ports = [found[key] for key in ("grpc_inference_port", "grpc_management_port", "initial_distribution_port")]
    assert len(set(ports)) == 3


def test_ranks_on_other_hosts_find_the_group_by_the_port_that_is_in_its_name(make, started, monkeypatch):
    """The README has them look for llama_29500, and `serve` took another port each time."""
    monkeypatch.setenv("PET_LOCAL_ADDR", "127.0.0.1")
    several = "torchrun: {nnodes: 2, nproc-per-node: 1, rdzv-endpoint: 'first-host:29400'}"
    found = properties_of(make(port=free_port_range(3), model_config=several), started)
    assert found["initial_distribution_port"] == "29500"


def test_variables_that_torchserve_lets_in_count_as_written(make, monkeypatch):
    monkeypatch.setenv("TS_INFERENCE_ADDRESS", "http://127.0.0.9:9999")
    assert make().port == 8080
    assert str(make("enable_envvars_config=true").listeners.inference) == "http://127.0.0.9:9999"


@pytest.mark.parametrize(
    ("lines", "arguments", "words"),
    [
        (["inference_address=http://127.0.0.1:8080"], {"port": 9000}, "--port 9000 contradicts inference_address="),
        (["inference_address=http://10.0.0.1:80"], {"host": "0.0.0.0"}, "--host 0.0.0.0 contradicts inference_addr"),
        (["inference_address=unix:/tmp/socket"], {}, "must be http://HOST:PORT"),
        (["management_address=http://[::1]:8081"], {}, "management_address=.*must be http://HOST:PORT"),
        (["inference_address=http://127.0.0.1"], {}, "has no port"),
        (["inference_address=http://127.0.0.1:99999"], {}, "an integer from 1 to 65534"),
        ([], {"port": 65534}, "management would be at 65535; choose a port of at most 65532"),
        ([], {"port": 65533}, "metrics would be at 65535"),
        ([], {"port": 0}, "--port 0: a port must be an integer"),
        ([], {"port": 1e3}, r"--port 1000\.0: a port must be an integer"),
        ([], {"port": True}, "--port True: a port must be an integer"),
        ([], {"host": "::1"}, "--host ::1: must be an IPv4 address"),
        ([], {"host": "http://me"}, "--host http://me: "),
        ([], {"properties": "nowhere.properties"}, "nowhere.properties: No such file"),
    ],
    ids=str,
)
def test_an_address_that_cannot_be_is_refused_by_name(make, lines, arguments, words):
    with pytest.raises(ServerError, match=words) as caught:
        make(*lines, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "arguments", "words"),
    [
        (["model_store=/somewhere/else"], {}, "--model_store .* contradicts model_store=/somewhere/else in "),
        (["load_models=all"], {}, "--model_name llama contradicts load_models=all"),
        (["vmargs=-Xmx1g -Dlog4j.configurationFile=/mine.xml"], {}, "has no effect; use --log_config"),
        ([], {"model_name": "other"}, "there is no model 'other' in .*; choose from llama"),
        ([], {"model_store": "/nowhere"}, "there is no model 'llama' in /nowhere; create one with `llama-tp package`"),
        ([], {"log_config": "nowhere.xml"}, "nowhere.xml does not exist"),
        ([], {"host": "192.0.2.1"}, "host '192.0.2.1' is not an address of this machine"),
        ([], {"host": "no-such-host.invalid"}, "host 'no-such-host.invalid' does not resolve"),
    ],
    ids=str,
)
def test_what_would_be_overruled_or_fail_later_is_refused_by_name(make, started, lines, arguments, words):
    server = make(*lines, **{"port": free_port(), **arguments})
    with pytest.raises(ServerError, match=words):
        server.start()
    assert not started


def test_a_busy_port_is_named(make, started):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use"):
            make(port=port).start()
    assert not started


def test_properties_are_read_as_java_reads_them():
    text = "# a = 1\n! b\n\n  c = 1 \nd:2\ne 3\nf=1,\\\n   2\ng\\ h=\\u00e9\\t=\ni=\nj\n"
    values = {"c": "1 ", "d": "2", "e": "3", "f": "1,2", "g h": "é\t=", "i": "", "j": ""}
    assert parse_properties(text) == values


# --- what it runs in


def variables(**arguments):
    return frontend_environment(**{"port": 8080, "log_dir": Path("/logs"), "num_hosts": 1, **arguments})


@pytest.fixture
def bare(monkeypatch):
    """No variable that matters is set."""
    for name in (
        *("LC_ALL", "LC_CTYPE", "LANG", "PET_LOCAL_ADDR", "TS_CONFIG_FILE", "GLOO_SOCKET_IFNAME", "JAVA_HOME"),
        "METRICS_LOCATION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "java_home", lambda: None)
    return monkeypatch


def test_on_one_host_torchrun_is_told_to_use_loopback_unless_the_operator_says_otherwise(bare):
    assert variables()["PET_LOCAL_ADDR"] == "127.0.0.1"
    bare.setenv("PET_LOCAL_ADDR", "10.1.2.3")
    assert variables()["PET_LOCAL_ADDR"] == "10.1.2.3"


@pytest.mark.parametrize("name", ["192.0.2.1", "no-such-host.invalid"])
def test_of_several_hosts_the_first_must_be_reachable_by_its_name(bare, name):
    """The others would wait for it, for ever and without a word."""
    bare.setattr(environment.socket, "gethostname", lambda: name)
    with pytest.raises(ServerError, match=f"{name!r}, .*set PET_LOCAL_ADDR"):
        variables(num_hosts=2)
    bare.setenv("PET_LOCAL_ADDR", "10.1.2.3")
    assert variables(num_hosts=2)["PET_LOCAL_ADDR"] == "10.1.2.3"
    bare.delenv("PET_LOCAL_ADDR")
    bare.setattr(environment.socket, "gethostname", lambda: "localhost")
    assert "PET_LOCAL_ADDR" not in variables(num_hosts=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "C.UTF-8"),
        ({"LC_ALL": "C"}, "C.UTF-8"),
        ({"LANG": "POSIX"}, "C.UTF-8"),
        ({"LC_ALL": "", "LANG": "C.utf8"}, ""),
        ({"LC_ALL": "C.utf8"}, "C.utf8"),
        ({"LC_ALL": "xx_XX.UTF-8"}, "C.UTF-8"),  # not installed
    ],
    ids=str,
)
def test_the_c_locale_does_not_reach_java_which_could_not_open_paths_with_accents(bare, values, expected):
    for name, value in values.items():
        bare.setenv(name, value)
    before = locale.setlocale(locale.LC_CTYPE)
    assert variables()["LC_ALL"] == expected
    assert locale.setlocale(locale.LC_CTYPE) == before, "that of this process is as it was"


def test_a_variable_that_would_replace_the_properties_is_refused_by_name(bare):
    """TorchServe prefers TS_CONFIG_FILE to --ts-config: it listened elsewhere, and was "not ready"."""
    bare.setenv("TS_CONFIG_FILE", "/mine.properties")
    with pytest.raises(ServerError, match=r"TS_CONFIG_FILE=/mine\.properties .*unset it"):
        variables()


def test_an_interface_that_this_host_lacks_is_named_beside_those_that_it_has(bare):
    bare.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ServerError, match=r"GLOO_SOCKET_IFNAME=eth77: .*it has .*\blo\b"):
        variables()
    bare.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert variables()["GLOO_SOCKET_IFNAME"] == "lo"


def test_log_and_metrics_locations_of_the_operator_are_kept(bare, make):
    bare.setenv("LOG_LOCATION", "/var/log/llama")
    bare.setenv("METRICS_LOCATION", "/var/log/metrics")
    server = make()
    assert server.log_file == Path("/var/log/llama/model_log.log")
    given = variables(log_dir=server.log_dir)
    assert (given["LOG_LOCATION"], given["METRICS_LOCATION"]) == ("/var/log/llama", "/var/log/metrics")


@pytest.mark.parametrize(("version", "problem"), [(None, "has no bin/java"), ("1.8.0_402", "is Java 8")])
def test_a_java_home_that_will_not_do_is_named(tmp_path, monkeypatch, version, problem):
    if version:
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ServerError, match=f"JAVA_HOME={tmp_path} {problem}"):
        environment.java_home()


def test_sockets_have_short_paths_wherever_temporary_files_go(tmp_path, monkeypatch, capsys):
    """The path of a unix socket has at most 107 bytes; a log said so, and `serve` only "not ready"."""
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    folder = private_folder(7)
    assert folder == tmp_path / f"llama_tp.{os.getuid()}.7"
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(environment.tempfile, "tempdir", str(long))
    folder = private_folder(free_port())
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(folder / ".ts.sock.65535"))
        (folder / ".ts.sock.65535").unlink()
    finally:
        folder.rmdir()
    assert f"TMPDIR={long} is too long" in capsys.readouterr().err


def test_a_folder_for_sockets_that_others_can_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"llama_tp.{os.getuid()}.7"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ServerError, match="must be a private folder that you own"):
        private_folder(7)


def test_what_the_scripts_fetch_from_this_machine_does_not_go_through_a_proxy(frontend):
    """curl asks the proxy of the environment for localhost, too."""
    script = f". scripts/environment.sh; curl -sS http://localhost:{frontend.server_port}/models/llama"
    env = {**os.environ, "http_proxy": f"http://127.0.0.1:{free_port()}"}
    frontend.answers["/models/llama"] = (200, "here")
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "here"), done.stderr


# --- its process


@pytest.fixture
def running(make, bare, tmp_path):
    """A server that was started, with a process that sleeps in the place of Java."""
    torchserve = tmp_path / "torchserve"
    torchserve.write_text(f"#!/bin/sh\n{sys.executable} -c 'import time; time.sleep(60)' {FRONTEND} &\n")
    torchserve.chmod(0o755)
    bare.setattr("llama_tp.torchserve.server.program", lambda _: torchserve)
    (tmp_path / "tmp").mkdir()
    bare.setattr(environment.tempfile, "tempdir", str(tmp_path / "tmp"))
    server = make("disable_token_authorization=true", port=free_port_range(3))
    server.start()
    yield server
    server.stop()


FRONTEND = "org.pytorch.serve.ModelServer"


def test_a_server_is_found_and_stopped_whatever_the_temporary_folder_is_by_then(running, monkeypatch, tmp_path):
    """ "no server of ours is running", said `stop`, while it answered."""
    pid = running.pid
    monkeypatch.setattr(environment.tempfile, "tempdir", "/tmp")
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert stop_server(running.port)
    assert not is_alive(pid)
    assert running.pid is None
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not stop_server(running.port)


def test_a_second_server_on_the_port_is_refused_and_the_first_lives_on(running, make):
    with pytest.raises(ServerError, match=f"already running on port {running.port} .*stop it first"):
        (second := make(port=running.port)).start()
    assert not second.stop()
    assert is_alive(running.pid)


def test_stop_leaves_alone_what_serve_has_not_started(tmp_path):
    """Such as somebody's own `torchserve --start` on the same port; `health` knows it."""
    port = free_port()
    (tmp_path / "own.properties").write_text(f"inference_address=http://127.0.0.1:{port}\n")
    command = [sys.executable, "-c", "import time; time.sleep(60)", FRONTEND, "-f", "own.properties"]
    with subprocess.Popen(command, cwd=tmp_path) as other:
        try:
            assert wait_until(lambda: find_frontend(port) is not None)
            found = find_frontend(port)
            assert (found.pid, found.working_dir, found.is_ours) == (other.pid, tmp_path, False)
            assert not stop_server(port)
            assert other.poll() is None
        finally:
            other.kill()


def test_in_the_foreground_the_ranks_log_is_printed_until_the_server_ends_by_itself(running, capsys):
    running.log_file.write_text("a line of rank 0\n")
    (running.log_dir / "console.log").write_text("Java has no memory\n\n")
    os.kill(running.pid, signal.SIGKILL)
    with pytest.raises(ServerError, match=r"torchserve has exited: Java has no memory; see .*console\.log"):
        running.wait_until_ended()
    assert capsys.readouterr().out == "a line of rank 0\n"


def test_a_server_that_does_not_get_ready_says_why(running, monkeypatch):
    times = iter([0.0, 0.2, 0.4])  # it is asked once, however long that takes
    monkeypatch.setattr("llama_tp.torchserve.server.monotonic", lambda: next(times))
    with pytest.raises(ServerError, match=r"not ready after 0\.3 s: .* does not answer: Connection refused; see "):
        running.wait_until_ready(0.3)


# --- health


class Frontend(ThreadingHTTPServer):
    """Answers as TorchServe does, so far as `health` asks it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FrontendHandler)
        self.answers = {
            "/models/llama": (200, json.dumps([{"workers": [{"status": "READY"}]}])),
            "/predictions/llama": (200, json.dumps({"text": "a", "usage": {}})),
        }
        self.tokens = {}
        """The token that each path wants."""
        self.renew = None
        """What /token does."""


class FrontendHandler(BaseHTTPRequestHandler):
    server: Frontend

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/token":
            self.server.renew(self.path, self.headers["Authorization"])
            return self._send(200, "")
        wanted = self.server.tokens.get(path)
        if wanted and self.headers["Authorization"] != f"Bearer {wanted}":
            return self._send(400, json.dumps({"code": 400, "message": "Token Authorization failed."}))
        return self._send(*self.server.answers[path])

    do_POST = do_GET

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def frontend():
    server = Frontend()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(frontend, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    address = Address("http", "127.0.0.1", frontend.server_port)
    return Client(address, address, "llama", key_file=tmp_path / "key_file.json")


def test_a_server_that_generates_is_healthy_whatever_proxies_there_are(client):
    assert client.why_not_generating() is None
    assert client.why_not_ready() is None


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_too_busy_to_be_asked_is_healthy_and_one_without_ranks_is_not(client, frontend, status):
    """An orchestrator would end it for its success."""
    frontend.answers["/predictions/llama"] = (status, json.dumps({"code": status, "message": "no worker"}))
    assert client.why_not_generating() is None
    frontend.answers["/models/llama"] = (200, json.dumps([{"workers": [{"status": "UNLOADED"}]}]))
    assert f"answers {status}: no worker" in client.why_not_generating()
    assert client.why_not_ready() == "the ranks of llama are not ready: UNLOADED"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, json.dumps({"code": 404, "message": "Model not found: llama"})), "answers 404: Model not found: llama"),
        ((400, json.dumps({"error": {"message": "prompt[0] is wrong"}})), r"answers 400: prompt\[0\] is wrong"),
        ((200, "<html>a router's\nlogin page"), "answers 200: <html>a router's login page"),
        ((500, ""), "answers 500: nothing"),
    ],
)
def test_a_server_that_does_not_generate_says_why_in_one_line(client, frontend, answer, words):
    frontend.answers["/predictions/llama"] = answer
    assert re.search(words, client.why_not_generating())


def test_a_port_where_nobody_listens_is_not_healthy():
    assert "Connection refused" in why_unhealthy("llama", free_port(), 1)


def keys(inference, expires="2099-01-01T00:00:00.123456789Z"):
    entry = {"key": inference, "expiration time": expires}
    return json.dumps({"inference": entry, "management": entry, "API": {"key": "api"}})


@pytest.mark.parametrize(
    "expires", ["2099-01-01T00:00:00Z", "2099-01-01T00:00:00.123456789Z", "+12026-01-01T00:00:00Z"]
)
def test_a_token_that_is_good_is_used_and_not_renewed_which_would_end_that_of_others(
    client, frontend, tmp_path, expires
):
    frontend.tokens = {"/predictions/llama": "good", "/models/llama": "good"}
    (tmp_path / "key_file.json").write_text(keys("good", expires))
    assert client.why_not_generating() is None
    assert client.why_not_ready() is None


def test_a_token_that_has_expired_is_renewed_with_the_api_key(client, frontend, tmp_path):
    frontend.tokens = {"/predictions/llama": "new"}
    (tmp_path / "key_file.json").write_text(keys("old", "2026-01-01T00:00:00.5Z"))
    asked = []

    def renew(path, authorization):
        asked.append((path, authorization))
        (tmp_path / "key_file.json").write_text(keys("new"))

    frontend.renew = renew
    assert client.why_not_generating() is None
    assert client.why_not_generating() is None
    assert asked == [("/token?type=inference", "Bearer api")]


def test_the_tokens_of_production_outlive_the_server():
    """They expired after an hour."""
    minutes = float(Properties.read(CONFIGS / "config.production.properties").values["token_expiration_min"])
    assert minutes > 5 * 365 * 24 * 60


@pytest.mark.parametrize(
    "argv", [["--port=abc"], ["--port=0"], ["--prot=1"], ["--wait=soon"], ["--timeout_s=True"]], ids=str
)
def test_the_exit_code_of_health_tells_wrong_arguments_from_a_sick_server(argv):
    command = [sys.executable, "-m", "llama_tp", "health", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "asked"),
    [([], 1, 1), (["--wait", "60"], 0, 3), (["--wait"], 0, 3), (["--wait", "0.01"], 1, None)],
    ids=str,
)
def test_health_waits_for_a_server_as_long_as_it_is_told(argv, code, asked, monkeypatch, run):
    """The third answer is good, if anybody asks for it in time."""
    answers = iter(["Connection refused", "the ranks are loading", None])
    given = []

    def why_unhealthy(*_):
        given.append(next(answers))
        return given[-1]

    monkeypatch.setattr("llama_tp.torchserve.server.why_unhealthy", why_unhealthy)
    monkeypatch.setattr("llama_tp.cli.serve.sleep", lambda seconds: time.sleep(0.02))
    found, out, err = run("health", *argv)
    assert found == code
    assert out == ("llama on port 8080 is healthy\n" if code == 0 else "")
    assert ("not healthy: " in err) == (code == 1)
    assert asked is None or len(given) == asked


# --- progress


def test_what_the_ranks_are_doing_is_told_line_by_line_where_there_is_no_terminal(tmp_path, capsys):
    log = tmp_path / "model_log.log"
    log.write_text("the model was not loaded: last year's reason\n")
    progress = StartupProgress(LogTail(log))
    progress.update()
    with open(log, "a") as lines:
        lines.write("2026 [INFO ] model_name: llama, batchSize: 8\n")
        lines.flush()
        progress.update()
        progress.update()
        lines.write(f"2026 [INFO ] {READ.format(percent=35)}\n")
        lines.flush()
        progress.update()
        lines.write("loaded in 0.6 s: 2 ranks\n")
        lines.flush()
        progress.update()
        assert progress.refusal is None
        assert progress.can_chat
        lines.write("2026 [INFO ] chat format: none: it has no template\n")
        lines.write("Backend worker process died.\nmodel_name: llama\n")
        lines.write("2026 [INFO ] the model was not loaded: rank 1: no memory\n2026 [INFO ] Trace")
        lines.flush()
        progress.update()
    told = [line.split(" s  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "TorchServe is starting",
        "the ranks are loading the model",
        "the ranks are loading the model: 35 %",
        "generating the first token",
        "the ranks are loading the model again, after 1 exited",
    ]
    assert progress.refusal == "rank 1: no memory"
    assert not progress.can_chat


def test_a_log_that_begins_anew_is_read_from_its_beginning(tmp_path):
    log = tmp_path / "model_log.log"
    tail = LogTail(log)
    assert list(tail.new_lines()) == []
    log.write_text("one\ntw")
    assert list(tail.new_lines()) == ["one"]
    with open(log, "a") as more:
        more.write("o\n")
    assert list(tail.new_lines()) == ["two"]
    log.rename(tmp_path / "model_log.1.log")
    log.write_text("three\n")
    assert list(tail.new_lines()) == ["three"]


def test_stop_touches_neither_other_users_processes_nor_folders_that_only_a_process_names(tmp_path, monkeypatch):
    """As root it deleted whatever folder a process of anybody's said was its TEMP."""
    victim = tmp_path / "victim"
    victim.mkdir()
    port = free_port()
    command = [sys.executable, "-c", "import time; time.sleep(60)", "org.pytorch.serve.ModelServer"]
    process = subprocess.Popen(command, env={"TEMP": str(victim), MARK: str(port)})
    try:
        assert wait_until(lambda: find_frontend(port, ours_only=True) is not None)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: 54321)
            assert find_frontend(port) is None
            assert not stop_server(port)
        assert is_alive(process.pid)
        threading.Thread(target=process.wait).start()  # reaps it
        assert stop_server(port)
        assert not is_alive(process.pid)
        assert victim.is_dir()
    finally:
        process.kill()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "True"])
def test_a_timeout_that_is_no_time_is_refused_before_anything_starts(seconds, monkeypatch, capsys):
    from llama_tp.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["llama-tp", "serve", f"--timeout_s={seconds}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "must be a number" in capsys.readouterr().err
