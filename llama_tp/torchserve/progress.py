"""Show the progress of a starting TorchServe, from its log: on a terminal one updating line, elsewhere a line per
step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from llama_tp.checkpoint.load_progress import READ

_STAGES = (
    ("Listening on port: ", "the ranks are starting"),
    ("model_name: ", "the ranks are loading the model"),
    ("loaded in ", "generating the first token"),
)
"""Text in the ranks' log, and the stage that it begins."""
_READ = re.compile(READ.format(percent=r"(\d+)"))

_NO_CHAT = "chat format: none"
_REFUSAL = "the model was not loaded: "
_DIED = "Backend worker process died."
_REMIND_S = 30.0


class LogTail:
    """Lines appended to a log file from now on. The file need not exist yet, and may be rotated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._where_it_ends()
        self._rest = b""

    def new_lines(self) -> Iterator[str]:
        """The complete lines since the last call."""
        try:
            with open(self._path, "rb") as log:
                inode = self._path.stat().st_ino
                if inode != self._inode:
                    self._inode, self._offset, self._rest = inode, 0, b""
                log.seek(self._offset)
                data = log.read()
        except OSError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)

    def _where_it_ends(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_size


class StartupProgress:
    """Reads the ranks' log and reports progress on stderr."""

    def __init__(self, log: LogTail) -> None:
        self.refusal: str | None = None
        """The ranks' reason for not loading the model."""
        self.can_chat = True
        """Whether the model has a chat format."""
        self._log = log
        self._start = self._last_line = monotonic()
        self._stage = "TorchServe is starting"
        self._shown = ""
        self._num_deaths = 0
        self._is_terminal = sys.stderr.isatty()

    def update(self) -> None:
        """Read the log, and report changes."""
        for line in self._log.new_lines():
            self._read(line)
        seconds = monotonic() - self._start
        if self._is_terminal:
            print(f"\r\033[K  {self._stage} ({seconds:.0f} s)", end="", file=sys.stderr, flush=True)
        elif self._stage != self._shown or monotonic() - self._last_line > _REMIND_S:
            print(f"  {seconds:5.1f} s  {self._stage}", file=sys.stderr, flush=True)
            self._shown, self._last_line = self._stage, monotonic()

    def close(self) -> None:
        """Clear the updating line from the terminal."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _read(self, line: str) -> None:
        if _REFUSAL in line:
            self.refusal = line.partition(_REFUSAL)[2]
        if _NO_CHAT in line:
            self.can_chat = False
        if _DIED in line:
            self._num_deaths += 1
        again = f" again, after {self._num_deaths} exited" if self._num_deaths else ""
        for sign, stage in _STAGES:
            if sign in line:
                self._stage = stage + again
        if found := _READ.search(line):
            self._stage = f"the ranks are loading the model{again}: {found[1]} %"
