"""Fixtures that several unit tests share."""

import signal
import sys

import pytest
import torch

from llama_tp.cli import main as cli
from llama_tp.engine import loop as loop_module

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


class Clock:
    """The time of every loop, for which nothing but the test moves it."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def one_thread():
    """Tiny steps lose more by handing work to other threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_torchrun(monkeypatch):
    """As where nobody has started ranks. The names of the variables that say so."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return TORCHRUN


@pytest.fixture
def own_sigterm():
    """SIGTERM's handler is put back after a test of what sets one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(monkeypatch, capsys, own_sigterm):
    """Runs a command line of llama-tp in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("PAGER", "cat")
    monkeypatch.delenv("RANK", raising=False)

    def run_one(*argv):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/llama-tp", *argv])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_one
