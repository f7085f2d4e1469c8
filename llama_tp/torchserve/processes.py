"""Find and end the processes of a TorchServe on this host. Uses /proc, so it does not matter how, where or with which
TMPDIR a server was started."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.properties import Properties

MARK = "LLAMA_TP_SERVE_PORT"
"""Environment variable of processes started by `llama-tp serve`: the port of its inference API."""

_KILLED_S = 5.0
"""How long the kernel may take to end a killed process."""


@dataclass(frozen=True, slots=True)
class Frontend:
    """A running Java process of TorchServe."""

    pid: int
    properties: Properties | None
    """Its config.properties; None if it has none."""
    is_ours: bool
    """Whether `llama-tp serve` started it."""
    port: int
    """Port of its inference API."""
    model_store: Path | None = None
    """Where it has models from, if its command says so."""

    @property
    def working_dir(self) -> Path:
        """Where it writes key_file.json."""
        return Path(os.readlink(f"/proc/{self.pid}/cwd"))


def find_frontend(port: int, *, ours_only: bool = False) -> Frontend | None:
    """This user's TorchServe that listens on this port, or will once it has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            found = _frontend(folder)
            if found and found.port == port and (found.is_ours or not ours_only):
                return found
    return None


def _frontend(folder: Path) -> Frontend | None:
    """The frontend of a folder in /proc, if it is a TorchServe of this user in our network namespace: other namespaces
    have their own ports, and other users' processes may be forged."""
    if folder.stat().st_uid != os.getuid():
        return None
    command = folder.joinpath("cmdline").read_bytes().split(b"\0")
    if b"org.pytorch.serve.ModelServer" not in command:
        return None
    if os.readlink(folder / "ns/net") != os.readlink("/proc/self/ns/net"):
        return None
    environment = _environment(folder)
    properties = None
    path = environment.get("TS_CONFIG_FILE")
    if path is None and b"-f" in command:
        path = os.fsdecode(command[command.index(b"-f") + 1])
    with suppress(ServerError):
        properties = Properties.read(folder / "cwd" / path, environment) if path else None
    pid = int(folder.name)
    store = folder / "cwd" / os.fsdecode(command[command.index(b"-s") + 1]) if b"-s" in command else None
    if mark := environment.get(MARK):
        return Frontend(pid, properties, is_ours=True, port=int(mark), model_store=store)
    address = properties.address("inference_address") if properties else None
    port = address.port if address else 8080
    return Frontend(pid, properties, is_ours=False, port=port, model_store=store)


def _environment(folder: Path) -> dict[str, str]:
    entries = os.fsdecode(folder.joinpath("environ").read_bytes()).split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def environment_of(pid: int) -> dict[str, str]:
    """A process's initial environment; empty if it is gone."""
    try:
        return _environment(Path("/proc", str(pid)))
    except OSError:
        return {}


def end_tree(pid: int, grace_s: float) -> None:
    """End a process and its descendants: SIGTERM to the process, then SIGKILL to the rest. Waits until they are
    gone."""
    processes = [pid, *descendants(pid)]
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = monotonic() + grace_s
    while (alive := [one for one in processes if is_alive(one)]) and monotonic() < deadline:
        reap()
        sleep(0.05)
    for one in alive:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    deadline = monotonic() + _KILLED_S
    while any(map(is_alive, alive)) and monotonic() < deadline:
        reap()
        sleep(0.01)


def reap() -> None:
    """As a container's PID 1, reap orphans; no other process will."""
    with suppress(ChildProcessError):
        while os.getpid() == 1 and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
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
