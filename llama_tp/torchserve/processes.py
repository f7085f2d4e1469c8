"""Finding the processes of a TorchServe on this host, and ending them. From /proc, so that it does not matter how, from
where and with which TMPDIR a server was started."""

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
"""In the environment of what `llama-tp serve` starts: the port of its inference API."""


@dataclass(frozen=True, slots=True)
class Frontend:
    """A running Java process of TorchServe."""

    pid: int
    properties: Properties | None
    """Its config.properties; None if it has none."""
    is_ours: bool
    """Whether `llama-tp serve` has started it."""
    port: int
    """Of its inference API."""

    @property
    def working_dir(self) -> Path:
        """Where it writes key_file.json."""
        return Path(os.readlink(f"/proc/{self.pid}/cwd"))


def find_frontend(port: int, *, ours_only: bool = False) -> Frontend | None:
    """The TorchServe of this user that answers on this port of this host, or will when it has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            found = _frontend(folder)
            if found and found.port == port and (found.is_ours or not ours_only):
                return found
    return None


def _frontend(folder: Path) -> Frontend | None:
    """What a folder in /proc says, if it is of a TorchServe of this user in our network namespace: another namespace
    has ports of its own, and what another user's process says of itself may be forged."""
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
    if mark := environment.get(MARK):
        return Frontend(pid, properties, is_ours=True, port=int(mark))
    address = properties.address("inference_address") if properties else None
    return Frontend(pid, properties, is_ours=False, port=address.port if address else 8080)


def _environment(folder: Path) -> dict[str, str]:
    entries = os.fsdecode(folder.joinpath("environ").read_bytes()).split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; nothing if it is gone."""
    try:
        return _environment(Path("/proc", str(pid)))
    except OSError:
        return {}


def end_tree(pid: int, grace_s: float) -> None:
    """End a process and all below it: SIGTERM to the one, SIGKILL to what is left. Returns when they are gone."""
    processes = [pid, *descendants(pid)]
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = monotonic() + grace_s
    while (living := [one for one in processes if is_alive(one)]) and monotonic() < deadline:
        reap()
        sleep(0.05)
    for one in living:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def reap() -> None:
    """As a container's first process, take note of orphans that have ended; nobody else would."""
    with suppress(ChildProcessError):
        while os.getpid() == 1 and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """All processes below one."""
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
