"""The source files of a library, and how they are compiled."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from llama_tp import __version__
from llama_tp.model.cpu.compiler import Compiler, cpu_identity

_FORMAT_VERSION = 1
"""Of libraries and entries."""
_UNITS = (".cpp", ".cc", ".cxx", ".c++")


@dataclass(frozen=True, slots=True)
class Sources:
    """Translation units, the headers that they include, and flags."""

    files: tuple[Path, ...]
    flags: tuple[str, ...]

    def key(self) -> str:
        """Differs for anything but the compiler that changes the library, or the machines that can run it. OSError if a
        file cannot be read."""
        machine = [sys.platform, platform.machine(), platform.libc_ver(), cpu_identity()]
        contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in self.files]
        state = [_FORMAT_VERSION, __version__, contents, self.flags, machine]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]

    def command(self, compiler: Compiler, library: Path) -> list[str]:
        """Compile all units to one library. Flags come last, where libraries to link must be."""
        units = [str(path) for path in self.files if path.suffix in _UNITS]
        return [*compiler.command, *units, *self.flags, "-o", str(library)]
