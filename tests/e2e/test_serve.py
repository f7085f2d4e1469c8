"""`llama-tp serve`, `health` and `stop` with a real TorchServe: in surroundings as they are found, in production, and
by the commands of the README."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from llama_tp.torchserve.server import free_port_range
from tests.documentation import block_below
from tests.e2e.torchserve_rig import (
    BIN,
    CONFIG,
    MARK,
    READY_WITHIN_S,
    STOPPED_WITHIN_S,
    command_of,
    convert,
    free_ports,
    package,
    processes_marked,
    variables,
)
from tests.paths import CONFIGS, ROOT, SCRIPTS
from tests.tiny_llama2 import PASSAGE_REQUEST, REST_OF_PASSAGE
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

LLAMA_TP = [sys.executable, "-m", "llama_tp"]


@pytest.fixture(scope="module")
def store(tiny_llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("modèle été")
    convert(tiny_llama2, work)
    return package(work)


def run(*argv: str, env: dict[str, str], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [*LLAMA_TP, *argv]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def serve_arguments(store: Path, run_dir: Path, properties: Path) -> list[str]:
    arguments = ["serve", "--model_store", str(store), "--run_dir", str(run_dir), "--properties", str(properties)]
    return [*arguments, "--log_config", str(CONFIGS / "log4j2.xml"), "--timeout_s", str(READY_WITHIN_S)]


def ask(port: int, token: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request("POST", "/predictions/llama", json.dumps(PASSAGE_REQUEST), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def open_to_the_network(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Who listens on more than loopback, once for each socket."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # it has just ended
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and not re.match(r"(::ffff:)?127\.", connection.laddr.ip):
                    found.append(process)
    return found


def unresolvable_name(folder: Path) -> dict[str, str]:
    """Variables that make Python, and so torchrun, believe that this host has a name that leads nowhere."""
    (folder / "sitecustomize.py").write_text(
        "import socket\nsocket.gethostname = socket.getfqdn = lambda *_: 'no-such-host.invalid'\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_serve_does_not_mind_proxies_host_names_locales_and_temporary_folders(store: Path, tmp_path: Path) -> None:
    """Each of these ended in "not ready", or worse: in "not ready" after 20 minutes, or a healthy server that was
    stopped."""
    port = free_port_range(3)
    long = tmp_path / ("x" * (114 - len(str(tmp_path))))
    long.mkdir()
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    surroundings = {
        **unresolvable_name(tmp_path),
        "TMPDIR": str(long),
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        **dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), nowhere),
    }
    run_dir = tmp_path / "exécution"
    with variables(**surroundings) as env:
        try:
            served = run(
                *serve_arguments(store, run_dir, CONFIGS / "config.properties"), f"--port={port}", env=env, cwd=tmp_path
            )
            assert served.returncode == 0, served.stderr + logs(run_dir)
            assert f"llama is ready at http://127.0.0.1:{port}/predictions/llama" in served.stdout
            stages = ["TorchServe is starting", "the ranks are loading the model", "generating the first token"]
            assert [stage for stage in stages if stage in served.stderr] == stages
            status, body = ask(port)
            assert (status, json.loads(body)["text"]) == (200, REST_OF_PASSAGE)
            log = (run_dir / "logs" / "model_log.log").read_text()
            assert "loaded in " in log
            assert "torch/distributed" not in log

            elsewhere = {**env, "TMPDIR": str(tmp_path)}
            assert run("health", f"--port={port}", env=elsewhere, cwd=tmp_path).returncode == 0
            (agent,) = open_to_the_network(processes_marked(env[MARK]))  # torchrun's rendezvous
            assert any(word.endswith("/torchrun") for word in command_of(agent))
        finally:
            stopped = run("stop", f"--port={port}", env={**env, "TMPDIR": str(tmp_path)}, cwd=tmp_path)
        assert stopped.stdout == "stopped\n"
        unhealthy = run("health", f"--port={port}", env=env, cwd=tmp_path)
        assert (unhealthy.returncode, unhealthy.stdout) == (1, "")
        assert unhealthy.stderr.count("\n") == 1
        assert "Connection refused" in unhealthy.stderr


def logs(run_dir: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in run_dir.glob("logs/*.log"))


def test_in_production_tokens_that_expire_are_renewed_and_sigterm_ends_the_server(store: Path, tmp_path: Path) -> None:
    """It stopped working an hour after its start, and so did every probe."""
    port, management, metrics = free_ports(3)
    text = (CONFIGS / "config.production.properties").read_text()
    text = re.sub(r"token_expiration_min=\d+", "token_expiration_min=0.2", text)
    properties = tmp_path / "production.properties"
    addresses = {"inference_address": port, "management_address": management, "metrics_address": metrics}
    own = "".join(f"{key}=http://127.0.0.1:{value}\n" for key, value in addresses.items())
    properties.write_text(text + own)
    run_dir = tmp_path / "run"
    with variables() as env:
        command = [*LLAMA_TP, *serve_arguments(store, run_dir, properties), "--foreground"]
        server = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert f"llama is ready at http://127.0.0.1:{port}" in server.stdout.readline(), logs(run_dir)

        assert ask(port)[0] == 400
        assert run("health", f"--port={port}", env=env, cwd=tmp_path).returncode == 0
        expired = inference_token(run_dir)
        assert wait_until(lambda: ask(port, expired)[0] == 400)

        def ask_with_a_renewed_token() -> tuple[int, bytes]:
            assert run("health", f"--port={port}", env=env, cwd=tmp_path).returncode == 0
            return ask(port, inference_token(run_dir))

        # On a busy machine, 12 s may pass before it is used.
        answers = (ask_with_a_renewed_token() for _ in range(3))
        assert any(status == 200 and json.loads(body)["text"] == REST_OF_PASSAGE for status, body in answers)
        assert inference_token(run_dir) != expired

        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 128 + signal.SIGTERM
        assert wait_until(lambda: not processes_marked(env[MARK]), STOPPED_WITHIN_S)


def inference_token(run_dir: Path) -> str:
    token: str = json.loads((run_dir / "key_file.json").read_text())["inference"]["key"]
    return token


def test_the_commands_of_the_readme_can_be_pasted_one_after_the_other(tiny_llama2: Path, tmp_path: Path) -> None:
    """curl came before the server listened, `llama-tp chat` looked for what had been moved away, and where the host's
    name does not resolve torchrun hung."""
    ports = free_ports(5)
    (tmp_path / "configs").mkdir()
    for name in ("log4j2.xml", "requests"):
        (tmp_path / "configs" / name).symlink_to(CONFIGS / name)
    (tmp_path / "handler").symlink_to(ROOT / "handler")
    (tmp_path / "scripts").symlink_to(SCRIPTS)
    (tmp_path / "model-config.yaml").write_text(yaml.safe_dump(CONFIG))
    keys = ["inference_address", "management_address", "metrics_address"]
    settings = [f"{key}=http://127.0.0.1:{port}" for key, port in zip(keys, ports, strict=False)]
    settings += [f"grpc_inference_port={ports[3]}", f"grpc_management_port={ports[4]}"]
    text = (CONFIGS / "config.properties").read_text()
    (tmp_path / "configs" / "config.properties").write_text("\n".join([text, *settings, ""]))
    work = tmp_path / "t"  # short: sockets
    work.mkdir()
    steps = [block_below(f"**{words}") for words in ("Convert.", "Archive, serve, call", "In the terminal")]
    script = "\n".join(steps)
    assert "llama-tp verify" in script
    assert "curl" in script
    assert "llama-tp chat" in script
    script = script.replace("--model_parallel_size 1", "--model_parallel_size 2")
    script = script.replace("localhost:8080", f"localhost:{ports[0]}")
    script = script.replace("health ", f"health --port {ports[0]} ").replace("curl -v", "curl -sSf")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "llama-tp"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m llama_tp "$@"\n')
    tool.chmod(0o755)
    changes = {
        "D": str(tiny_llama2),
        "TMPDIR": str(work),
        "TEMP": str(work),
        "no_proxy": "*",
        **unresolvable_name(tmp_path),
    }
    with variables(**changes, PATH=f"{tmp_path / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}") as env:
        try:
            done = subprocess.run(
                ["bash", "-ex", "-c", script],
                env=env,
                cwd=tmp_path,
                input="Hello\n\n",
                capture_output=True,
                text=True,
                timeout=480,
                check=False,
            )
        finally:
            for process in processes_marked(env[MARK]):
                if "org.pytorch.serve.ModelServer" in command_of(process):
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
            wait_until(lambda: not processes_marked(env[MARK]), timeout_s=15)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count('"finish_reason"') == 2
    assert " tokens, first after " in done.stderr
