"""C++ compilers of this machine, and the CPU that -march=native compiles for."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

NAMES = ("c++", "g++", "clang++")
_CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),  # Arm
}
"""Those fields of /proc/cpuinfo that are constant and decide what -march=native is."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A program that may be able to compile C++ with OpenMP."""

    command: tuple[str, ...]
    """Absolute path, and arguments if $CXX has any."""
    identity: str
    """Differs for another version, and costs no start of the compiler: path, size and time of the file."""

    @property
    def name(self) -> str:
        return " ".join(self.command)


def find_compilers() -> list[Compiler]:
    """The compiler that $CXX names or, without it, those on PATH, each once. Only trying shows which of them works."""
    if own := os.environ.get("CXX", "").strip():
        found = _compiler(_words(own))
        return [] if found is None else [found]
    of_file: dict[str, Compiler] = {}
    for name in NAMES:
        if found := _compiler([name]):
            of_file.setdefault(os.path.realpath(found.command[0]), found)
    return list(of_file.values())


def why_none() -> str:
    """For where `find_compilers` finds none."""
    if own := os.environ.get("CXX", "").strip():
        return f"CXX={own} is not a program; correct or unset it"
    return f"there is no C++ compiler ({', '.join(NAMES)}) on PATH; install g++, or set CXX"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an open quote
        return text.split()


def _compiler(words: list[str]) -> Compiler | None:
    path = shutil.which(words[0]) if words else None
    if path is None:
        return None
    path = os.path.abspath(path)
    file = os.path.realpath(path)
    info = os.stat(file)
    identity = f"{path} {file} {info.st_size} {info.st_mtime_ns} {words[1:]}"
    return Compiler((path, *words[1:]), identity)


def cpu_identity() -> str:
    """Model and instructions of this machine's CPUs, which may be of several kinds."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    kinds = set()
    for processor in text.split("\n\n"):
        fields = (line.split(":", 1) for line in processor.splitlines() if ":" in line)
        kinds.add(tuple(sorted((key.strip(), value.strip()) for key, value in fields if key.strip() in _CPU_FIELDS)))
    return repr(sorted(kinds - {()}))
