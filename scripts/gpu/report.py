"""Sections: each is isolated from the others, has its own time budget, prints results as it gets them, and is written
to a JSON file when it ends. If one hangs or loses the CUDA context, a fresh process continues with the next section.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu.device import CUDA, DEVICE

T = TypeVar("T")

ENTRY = Path(__file__).resolve().parent.parent / "gpu_check.py"
_HUNG_S = 15.0
"""Seconds over budget after which a section must be stuck in a CUDA call, where signals do not reach it."""
_LEAST_S = 4.0
"""A section with less time left is not started."""


class SectionTimeout(BaseException):
    """The section's time is up. Not an Exception, so that handlers for those do not swallow it."""


class Report:
    """Results: section -> key -> value."""

    def __init__(self, path: Path, budget_s: float, used_s: float = 0.0) -> None:
        """`used_s`: seconds used by earlier processes of the same run, whose results are in the file."""
        self.path = path
        self.data: dict[str, dict[str, Any]] = json.loads(path.read_text()) if used_s else {}
        self.section = ""
        self.deadline = 0.0
        self._start = time.monotonic() - used_s
        self._budget_s = budget_s

    def put(self, key: str, value: T) -> T:
        """Record a result of the current section."""
        self.data[self.section][key] = value
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        print(f"[{self.elapsed():6.1f}s {self.section}] {key} = {text[:1500]}", flush=True)
        return value

    def guard(self, key: str, measure: Callable[[], T]) -> T | None:
        """Record the result of one measurement, or its error, which does not end the section."""
        try:
            return self.put(key, measure())
        except Exception as error:
            self._complain("errors", key)
            first = (str(error).splitlines() or [""])[0]
            self.put(key, {"error": f"{type(error).__name__}: {first[:300]}"})
            return None

    def expect(self, key: str, is_right: bool, value: Any = None) -> None:
        """Record a correctness check; a failed check fails the section at its end."""
        if not is_right:
            self._complain("wrong", key)
        self.put(key, value if is_right else {"WRONG": value})

    def get(self, section: str, key: str, default: Any) -> Any:
        """An earlier result, or the default."""
        value = self.data.get(section, {}).get(key, default)
        return default if isinstance(value, dict) and "error" in value else value

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        """Remaining seconds of the current section."""
        return self.deadline - time.monotonic()

    def total_left(self) -> float:
        return self._budget_s - self.elapsed()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1, default=str))

    def _complain(self, kind: str, key: str) -> None:
        self.data[self.section].setdefault(kind, []).append(key)


Section = tuple[str, Callable[[Report], None], float]
"""Name, function and budget in seconds."""


def run_sections(report: Report, sections: list[Section]) -> None:
    """Run them in order. May replace this process by a fresh one, which runs the rest."""
    names = [name for name, *_ in sections]
    with _watch_for_hangs(report, names):
        for index, (name, function, budget_s) in enumerate(sections):
            _run_section(report, name, function, budget_s)
            if not _is_healthy():
                report.data[name]["state"] = "failed: the CUDA context was lost"
                _resume(report, names[index + 1 :], f"the device does not answer after {name}")


def _run_section(report: Report, name: str, function: Callable[[Report], None], budget_s: float) -> None:
    found = report.data[name] = {}
    budget_s = min(budget_s, report.total_left() - 3)
    report.deadline = time.monotonic() + budget_s
    report.section = name
    if budget_s < _LEAST_S:
        found["state"] = report.put("skipped", "no time left")
        report.section = ""
        return
    is_armed = True

    def ring(*_: Any) -> None:
        if is_armed:
            raise SectionTimeout

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, budget_s, 3)
    begin = time.monotonic()
    try:
        try:
            function(report)
        finally:
            is_armed = False
        found["state"] = _state(found)
    except SectionTimeout:
        found["state"] = report.put("timeout", f"ended after {budget_s:.0f} s")
    except Exception as error:
        found["state"] = "failed: " + report.put("failed", f"{type(error).__name__}: {str(error)[:400]}")
        found["trace"] = traceback.format_exc()[-3000:]
        print(found["trace"], flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.put("seconds", round(time.monotonic() - begin, 1))
        with suppress(Exception):
            gc.collect()
            if CUDA:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        report.write()
        report.section = ""


def _state(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    return "; ".join(f"{kind}: {', '.join(found[kind])}" for kind in ("wrong", "errors") if kind in found) or "ok"


def _is_healthy() -> bool:
    if not CUDA:
        return os.environ.get("GPU_CHECK_LOST") is None  # simulates a lost context in tests
    try:
        return float(torch.ones(1, device=DEVICE).add_(1)) == 2
    except Exception:
        return False


@contextmanager
def _watch_for_hangs(report: Report, names: list[str]) -> Iterator[None]:
    """A kernel that never ends blocks the main thread in C code, where signal handlers do not run."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            section = report.section
            if section and time.monotonic() > report.deadline + _HUNG_S:
                report.data[section]["state"] = "failed: it hung"
                _resume(report, names[names.index(section) + 1 :], f"{section} hangs")

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _resume(report: Report, names: list[str], why: str) -> None:
    """Replace this process, whose CUDA context is unusable, by a fresh one that runs the sections `names`."""
    print(f"!!!! {why}; a fresh process continues with {', '.join(names) or 'nothing'}", flush=True)
    report.write()
    options = _without(sys.argv[1:], "--sections", "--skip", "--used")
    options += ["--sections", ",".join(names) or "none", "--used", f"{report.elapsed():.1f}"]
    os.environ.pop("GPU_CHECK_LOST", None)
    os.execv(sys.executable, [sys.executable, "-u", str(ENTRY), *options])


def _without(options: list[str], *names: str) -> list[str]:
    """Command-line options, without the given ones and their values."""
    kept: list[str] = []
    skip = False
    for option in options:
        if skip:
            skip = False
        elif option in names:
            skip = True
        elif option.partition("=")[0] not in names:
            kept.append(option)
    return kept


def summarize(report: Report) -> bool:
    """Print a line per section, and the shares of the roofline. Returns whether every section was ok or skipped."""
    print("\n==== summary ====")
    for section, values in report.data.items():
        print(f"{section:<14}{values.get('seconds', ''):>7} s  {values['state']}")
        for key, value in values.items():
            if isinstance(value, dict) and "of_roofline" in value:
                ms = value["ms"]["step"] if isinstance(value["ms"], dict) else value["ms"]
                share = f"{100 * value['of_roofline']:.1f} % of the roofline"
                print(f"    {key:<40}{ms:>10} ms {value['tok_s']:>9} tok/s   {share}")
    print(json.dumps({"file": str(report.path), "seconds": round(report.elapsed(), 1)}))
    return all(values["state"] == "ok" or values["state"].startswith("skipped: ") for values in report.data.values())
