"""Ends a server when the command that runs it in the foreground dies, even by SIGKILL.

A process of its own: TorchServe detaches itself from the command, so no signal of the kernel's reaches it.
"""

from __future__ import annotations

import subprocess
import sys
from time import monotonic, sleep

_LATE_S = 10.0
"""How long after the command's death a server may still appear that was just being started."""


class Watchdog:
    """The process. It notices the end of a pipe, which the kernel closes with the command."""

    def __init__(self, port: int) -> None:
        """port: of the server's inference API."""
        command = [sys.executable, "-m", "llama_tp.torchserve.watchdog", str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def dismiss(self) -> None:
        """End it: the server has been stopped."""
        self._process.kill()
        self._process.wait()


def watch(port: int) -> None:
    """Return once stdin has ended and the server on this port is gone."""
    sys.stdin.buffer.read()
    from llama_tp.torchserve.server import stop_server

    deadline = monotonic() + _LATE_S
    while not stop_server(port) and monotonic() < deadline:
        sleep(0.2)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
