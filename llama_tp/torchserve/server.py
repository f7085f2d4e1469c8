"""Start TorchServe, check that it is ready, stop it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from llama_tp.config_error import ConfigError
from llama_tp.resources import METRICS_CONFIG, resource
from llama_tp.torchserve.client import Client
from llama_tp.torchserve.drain import ANSWER_FOLDER, drain, forget_drain
from llama_tp.torchserve.environment import frontend_environment, is_private_folder, java_home, private_folder
from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.processes import end_tree, environment_of, find_frontend, is_alive, reap
from llama_tp.torchserve.programs import program
from llama_tp.torchserve.progress import LogTail, StartupProgress
from llama_tp.torchserve.properties import Address, Listeners, Properties, check_free, escaped

STOP_S = 20.0
"""How long to wait for TorchServe to exit before killing it."""

KEY_FILE = "key_file.json"
"""Where TorchServe writes its tokens."""
_DISTRIBUTION_PORT = 29500
"""TorchServe's default; part of the rendezvous id with which other hosts join the group."""


class TorchServe:
    """A TorchServe that serves one model. It writes only to `run_dir`; several can run on one host.

    Its metrics are those of configs/metrics.yaml, unless `properties` has a metrics_config.

    It listens at the addresses in `properties`. Defaults: the inference API on `host` and `port` (127.0.0.1 and 8080),
    management and metrics on the next two ports of 127.0.0.1.
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
        """ServerError if the properties and the other arguments conflict."""
        self.model_store = Path(model_store).resolve()
        self.model_name = model_name
        self.run_dir = Path(run_dir).resolve()
        self.properties = Properties.read(properties)
        self.log_config = Path(log_config).resolve()
        self.listeners: Listeners = self.properties.listeners(host, port)
        self._pid: int | None = None
        self.can_chat = True
        """Whether the model has a chat format. Known once it is ready."""
        self._is_launched = False
        self._log = LogTail(self.log_file)  # skips the output of earlier servers
        self._client = _client(self.listeners, model_name, self.run_dir, self.model_store)

    @property
    def pid(self) -> int | None:
        """The Java process, if it was started and is alive."""
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
        """The log of the ranks."""
        return self.log_dir / "model_log.log"

    @property
    def is_open(self) -> bool:
        """Whether it is reachable from other machines and needs neither token nor API key."""
        needs_nothing = self.token_file is None and self.api_key_file is None
        return needs_nothing and not self.listeners.inference.is_loopback

    @property
    def token_file(self) -> Path | None:
        """The file with TorchServe's tokens; None if they are off."""
        return None if self.properties.is_true("disable_token_authorization") else self.run_dir / KEY_FILE

    @property
    def api_key_file(self) -> Path | None:
        """The file with the key that requests must have; None if they need none."""
        return _api_key_file(self.model_store / self.model_name)

    @property
    def served_name(self) -> str:
        """The model's name in answers."""
        name = _configured(self.model_store / self.model_name, "handler", "served_model_name")
        return name if isinstance(name, str) else self.model_name

    def check_host(self) -> None:
        """ServerError if this host lacks what the server needs: free ports, TorchServe, Java."""
        if running := find_frontend(self.port, ours_only=True):
            raise ServerError(f"a server is already running on port {self.port} (process {running.pid}); stop it first")
        for address in dict.fromkeys(self.listeners):
            check_free(address)
        if not (torchserve := program("torchserve")).is_file():
            raise ServerError(f"{torchserve} does not exist; install it: pip install 'llama-tp[serve]'")
        java_home()

    def start(self) -> None:
        """Start the server; it loads the model in the background. ServerError if it cannot start."""
        self._check()
        num_hosts = _num_hosts(self.model_store / self.model_name)
        environment = frontend_environment(port=self.port, log_dir=self.log_dir, num_hosts=num_hosts)
        tmp_dir = private_folder(self.port)
        forget_drain(tmp_dir)
        environment["TMPDIR"] = str(tmp_dir)  # for torchserve's pid file
        environment["TEMP"] = str(tmp_dir)  # java.io.tmpdir, for the sockets to the ranks
        environment[ANSWER_FOLDER] = str(tmp_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        config = self.log_dir / "config.properties"  # run_dir itself may contain the user's file
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
        problem: str | None = "no time to check"
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
            self.can_chat = progress.can_chat
        raise ServerError(f"not ready after {timeout_s:g} s: {problem}; see {self.log_file}")

    def wait_until_ended(self) -> None:
        """Print the ranks' log while the server runs. ServerError when it exits on its own."""
        while True:
            self.print_log()
            self._check_alive()
            reap()
            sleep(0.2)

    def print_log(self) -> None:
        """Print what the ranks have logged since the last call."""
        for line in self._log.new_lines():
            print(line, flush=True)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for the open ones, printing the ranks' log. False if some were open after
        timeout_s. ServerError if the server exits."""

        def meanwhile() -> None:
            with suppress(OSError):  # the terminal may be closed
                self.print_log()
            self._check_alive()

        is_drained = drain(private_folder(self.port), timeout_s, meanwhile)
        meanwhile()
        return is_drained

    def stop(self, grace_s: float = STOP_S) -> bool:
        """End the server and its ranks, and wait until they are gone; False if none is running. `grace_s`: how long
        they have before they are killed."""
        return self._is_launched and stop_server(self.port, grace_s=grace_s)

    def _check(self) -> None:
        """Reject anything that would make TorchServe fail or silently ignore a setting."""
        if running := find_frontend(self.port, ours_only=True):
            raise ServerError(f"a server is already running on port {self.port} (process {running.pid}); stop it first")
        if not (self.model_store / self.model_name).is_dir():
            models = sorted(path.name for path in self.model_store.glob("[!.]*") if path.is_dir())
            remedy = f"choose from {', '.join(models)}" if models else "create one with `llama-tp package`"
            raise ServerError(f"there is no model {self.model_name!r} in {self.model_store}; {remedy}")
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
        """The operator's file, with defaults for settings that it omits."""
        own = self.properties
        open_settings: dict[str, object] = {
            "inference_address": self.listeners.inference,
            "management_address": self.listeners.management,
            "metrics_address": self.listeners.metrics,
            "metrics_config": escaped(str(resource(METRICS_CONFIG).resolve())),
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
            raise ServerError(f"torchserve has exited: {_last_line(console)}; see {console}")


def stop_server(port: int, drain_s: float = 0.0, *, grace_s: float = STOP_S) -> bool:
    """End the server that `llama-tp serve` started on this port, and its ranks; False if none was running.

    `drain_s`: how long its open requests may take to finish. `grace_s`: how long it may then take before it is killed.
    """
    frontend = find_frontend(port, ours_only=True)
    if frontend is None:
        return False
    tmp_dir = Path(environment_of(frontend.pid).get("TEMP", ""))
    is_ours = is_private_folder(tmp_dir, port)
    if drain_s > 0 and is_ours:
        drain(tmp_dir, drain_s)
    end_tree(frontend.pid, grace_s)
    if is_ours:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return True


def why_unhealthy(model_name: str, port: int, timeout_s: float) -> str | None:
    """Why the TorchServe on this port of this host does not generate a token; None if it does. Works however it was
    started: its process shows where it listens and keeps its tokens."""
    frontend = find_frontend(port)
    properties = frontend.properties if frontend else None
    if frontend is None or properties is None:
        folder, listeners, store = Path(), Properties().listeners(port=port), None
    else:
        folder, listeners, store = frontend.working_dir, properties.listeners(), frontend.model_store
    return _client(listeners, model_name, folder, store).why_not_generating(timeout_s)


def _client(listeners: Listeners, model_name: str, run_dir: Path, store: Path | None) -> Client:
    def api_key_file() -> Path | None:
        return None if store is None else _api_key_file(store / model_name)

    return Client(
        listeners.inference,
        listeners.management,
        model_name,
        key_file=run_dir / KEY_FILE,
        api_key_file=api_key_file,
    )


def _num_hosts(model_dir: Path) -> int:
    """The number of hosts of the model."""
    num_hosts = _configured(model_dir, "torchrun", "nnodes")
    return num_hosts if isinstance(num_hosts, int) else 1


def _api_key_file(model_dir: Path) -> Path | None:
    """The file with the key that requests for the model must have; None if they need none."""
    path = _configured(model_dir, "handler", "api_key_file")
    return model_dir / path if isinstance(path, str) else None


def _configured(model_dir: Path, section: str, key: str) -> object:
    """A value in a model's configuration; None if it has none. The ranks report errors in it."""
    from llama_tp.torchserve.config import read_yaml  # needs pydantic, which is not needed to stop a server

    try:
        manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
        config = read_yaml(model_dir / manifest["model"]["configFile"])
        return config[section].get(key)  # type: ignore[index]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError):
        return None


def _last_line(path: str) -> str:
    return next((line for line in reversed(Path(path).read_text(errors="replace").splitlines()) if line.strip()), "")


def free_ports(count: int) -> list[int]:
    """Ports that are currently free."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def free_port_range(count: int) -> int:
    """The first of `count` consecutive free ports. ServerError if there are none."""
    for _ in range(100):
        (port,) = free_ports(1)
        with suppress(ServerError, OverflowError):
            for offset in range(count):
                check_free(Address("http", "127.0.0.1", port + offset))
            return port
    raise ServerError(f"no {count} consecutive ports are free")
