"""Starting TorchServe, knowing when it is ready, stopping it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from llama_tp.config import ConfigError
from llama_tp.torchserve.client import Client
from llama_tp.torchserve.environment import frontend_environment, is_private_folder, private_folder
from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.processes import end_tree, environment_of, find_frontend, is_alive, reap
from llama_tp.torchserve.programs import program
from llama_tp.torchserve.progress import LogTail, StartupProgress
from llama_tp.torchserve.properties import Address, Listeners, Properties, check_free

STOP_S = 20.0
"""How long TorchServe gets to end before it is killed."""

_DISTRIBUTION_PORT = 29500
"""TorchServe's default; part of the name by which other hosts join the group."""


class TorchServe:
    """One TorchServe that serves one model. Everything it writes lies in `run_dir`; several can run on one host.

    It listens where `properties` says, and where that says nothing: the inference API on `host` and `port` (127.0.0.1
    and 8080), management and metrics on the next two ports of 127.0.0.1.
    """

    def __init__(
        self,
        *,
        model_store: str | Path,
        model_name: str,
        run_dir: str | Path,
        host: str | None = None,
        port: int | None = None,
        properties: str | Path,
        log_config: str | Path,
    ) -> None:
        """ServerError if the properties and the other arguments contradict each other."""
        self.model_store = Path(model_store).resolve()
        self.model_name = model_name
        self.run_dir = Path(run_dir).resolve()
        self.properties = Properties.read(properties)
        self.log_config = Path(log_config).resolve()
        self.listeners: Listeners = self.properties.listeners(host, port)
        self._pid: int | None = None
        self._is_launched = False
        self._log = LogTail(self.log_file)  # what earlier servers logged does not concern this one
        self._client = Client(
            self.listeners.inference, self.listeners.management, model_name, self.run_dir / "key_file.json"
        )

    @property
    def pid(self) -> int | None:
        """The Java process, if it was started and lives."""
        return self._pid if self._pid and is_alive(self._pid) else None

    @property
    def port(self) -> int:
        return self.listeners.inference.port

    @property
    def url(self) -> str:
        address = self.listeners.inference
        return f"{address.scheme}://{address.local_host}:{address.port}/predictions/{self.model_name}"

    @property
    def log_dir(self) -> Path:
        return Path(os.environ.get("LOG_LOCATION") or self.run_dir / "logs")

    @property
    def log_file(self) -> Path:
        """What the ranks print."""
        return self.log_dir / "model_log.log"

    @property
    def is_open(self) -> bool:
        """Whether whoever reaches it may use it, and others than this machine may reach it."""
        tokens_are_off = self.properties.is_true("disable_token_authorization")
        return tokens_are_off and not self.listeners.inference.is_loopback

    def start(self) -> None:
        """Start the server; it loads the model in the background. ServerError if it cannot start."""
        self._check()
        num_hosts = _num_hosts(self.model_store / self.model_name)
        environment = frontend_environment(port=self.port, log_dir=self.log_dir, num_hosts=num_hosts)
        tmp_dir = str(private_folder(self.port))
        environment["TMPDIR"] = tmp_dir  # of torchserve's pid file
        environment["TEMP"] = tmp_dir  # Java's java.io.tmpdir, and so of the sockets to the ranks
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        config = self.log_dir / "config.properties"  # in run_dir itself may lie the one that was given
        config.write_text(self._complete_properties(num_hosts), encoding="latin-1")
        torchserve = program("torchserve")
        command = [str(torchserve), "--ncs", "--start", "--model-store", str(self.model_store)]
        command += ["--models", self.model_name, "--ts-config", str(config), "--log-config", str(self.log_config)]
        try:
            self._launch(command, environment)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once a token has been generated through all ranks. ServerError on failure or timeout."""
        deadline = monotonic() + timeout_s
        progress = StartupProgress(self._log)
        problem: str | None = "there was no time to ask"
        try:
            while monotonic() < deadline:
                self._check_alive()
                progress.update()
                if progress.refusal:
                    raise ServerError(f"the model was not loaded: {progress.refusal}; see {self.log_file}")
                problem = self._client.why_not_ready() or self._client.why_not_generating()
                if problem is None:
                    return
                sleep(0.2)
        finally:
            progress.close()
        raise ServerError(f"not ready after {timeout_s:g} s: {problem}; see {self.log_file}")

    def wait_until_ended(self) -> None:
        """Print what the ranks log, as long as the server runs. ServerError when it has ended by itself."""
        while True:
            for line in self._log.new_lines():
                print(line, flush=True)
            self._check_alive()
            reap()
            sleep(0.2)

    def stop(self) -> bool:
        """End the server that was started, and its ranks; False if none is running. Returns when they are gone."""
        return self._is_launched and stop_server(self.port)

    def _check(self) -> None:
        """Refuse what would make TorchServe fail, or silently ignore a setting."""
        if running := find_frontend(self.port, ours_only=True):
            raise ServerError(f"a server on port {self.port} is running already (process {running.pid}); stop it first")
        if not (self.model_store / self.model_name).is_dir():
            models = sorted(path.name for path in self.model_store.glob("[!.]*") if path.is_dir())
            there = f"it has {', '.join(models)}" if models else "make one with `llama-tp package`"
            raise ServerError(f"there is no model {self.model_name!r} in {self.model_store}; {there}")
        if not self.log_config.is_file():
            raise ServerError(f"--log_config {self.log_config} does not exist")
        own = self.properties
        for key, flag, value in (
            ("model_store", "model_store", str(self.model_store)),
            ("load_models", "model_name", self.model_name),
        ):
            said = own.get(key)
            if said is not None and said != value and str(Path(said).resolve()) != value:
                raise ServerError(f"--{flag} {value} contradicts {own.said(key)}; make them agree or remove the line")
        if "-Dlog4j.configurationFile=" in (own.get("vmargs") or ""):
            raise ServerError(f"{own.said('vmargs')}: -Dlog4j.configurationFile has no effect; use --log_config")
        for address in dict.fromkeys(self.listeners):
            check_free(address)

    def _complete_properties(self, num_hosts: int) -> str:
        """The operator's file, and what it leaves open."""
        own = self.properties
        open_settings: dict[str, object] = {
            "inference_address": self.listeners.inference,
            "management_address": self.listeners.management,
            "metrics_address": self.listeners.metrics,
        }
        ports = free_ports(3)
        for key, port in zip(("grpc_inference_port", "grpc_management_port"), ports, strict=False):
            open_settings[key] = port
        open_settings["initial_distribution_port"] = ports[2] if num_hosts == 1 else _DISTRIBUTION_PORT
        added = [f"{key}={value}" for key, value in open_settings.items() if own.get(key) is None]
        return "\n".join([own.text.rstrip("\n"), *added, ""])

    def _launch(self, command: list[str], environment: dict[str, str]) -> None:
        self._is_launched = True
        with open(self.log_dir / "console.log", "ab") as console:
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    cwd=self.run_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                    check=False,
                )
            except FileNotFoundError:
                raise ServerError(f"{command[0]} does not exist; install it: pip install 'llama-tp[serve]'") from None
        deadline = monotonic() + 5
        while not (found := find_frontend(self.port, ours_only=True)):
            if done.returncode or monotonic() > deadline:
                raise ServerError(f"torchserve did not start: {_last_line(console.name)}; see {console.name}")
            sleep(0.05)
        self._pid = found.pid

    def _check_alive(self) -> None:
        if self.pid is None:
            console = str(self.log_dir / "console.log")
            raise ServerError(f"torchserve has ended: {_last_line(console)}; see {console}")


def stop_server(port: int) -> bool:
    """End the server that `llama-tp serve` started on this port, and its ranks; False if none was running."""
    frontend = find_frontend(port, ours_only=True)
    if frontend is None:
        return False
    tmp_dir = Path(environment_of(frontend.pid).get("TEMP", ""))
    end_tree(frontend.pid, STOP_S)
    if is_private_folder(tmp_dir, port):
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return True


def why_unhealthy(model_name: str, port: int, timeout_s: float) -> str | None:
    """Why the TorchServe on this port of this host does not generate a token; None if it does. However it was started:
    where it listens and has its tokens is what its process says."""
    frontend = find_frontend(port)
    properties = frontend.properties if frontend else None
    if frontend is None or properties is None:
        folder, listeners = Path(), Properties().listeners(port=port)
    else:
        folder, listeners = frontend.working_dir, properties.listeners()
    client = Client(listeners.inference, listeners.management, model_name, folder / "key_file.json")
    return client.why_not_generating(timeout_s)


def _num_hosts(model_dir: Path) -> int:
    """How many hosts the model is spread over. What is wrong with its configuration, the ranks will say."""
    from llama_tp.torchserve.config import read_yaml  # needs pydantic, which stopping a server does not

    try:
        manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
        config = read_yaml(model_dir / manifest["model"]["configFile"])
        num_hosts = config["torchrun"].get("nnodes", 1)  # type: ignore[index]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError):
        return 1
    return num_hosts if isinstance(num_hosts, int) else 1


def _last_line(path: str) -> str:
    return next((line for line in reversed(Path(path).read_text(errors="replace").splitlines()) if line.strip()), "")


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


def free_port_range(count: int) -> int:
    """The first of `count` free ports in a row. ServerError if there are none."""
    for _ in range(100):
        (port,) = free_ports(1)
        with suppress(ServerError, OverflowError):
            for offset in range(count):
                check_free(Address("http", "127.0.0.1", port + offset))
            return port
    raise ServerError(f"no {count} ports in a row are free")
