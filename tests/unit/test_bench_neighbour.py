"""`--neighbour`: a process that computes only while it is let, and never for longer than its parent lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_tp.bench.neighbour import BESIDE, IDLE, Neighbour, conditions
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def state_of(pid):
    """R, S, T (stopped), Z (ended, and not waited for); None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def test_it_computes_while_it_is_let_and_only_then():
    with Neighbour() as neighbour:
        with neighbour.busy():
            assert wait_until(lambda: neighbour.cpu_s > 0.1)
        assert wait_until(lambda: state_of(neighbour._process.pid) == "T")
        before = neighbour.cpu_s
        time.sleep(0.3)
        assert neighbour.cpu_s == before


def test_conditions_are_idle_alone_or_both():
    with conditions(with_neighbour=False) as found:
        assert found.names == (IDLE,)
        with found.under(IDLE):
            pass
    with conditions(with_neighbour=True) as found:
        assert found.names == (IDLE, BESIDE)
        pid = found._neighbour._process.pid
        with found.under(BESIDE):
            assert wait_until(lambda: state_of(pid) != "T")
        with pytest.raises(ZeroDivisionError), found.under(BESIDE):
            raise ZeroDivisionError
        assert wait_until(lambda: state_of(pid) == "T")
    assert state_of(pid) is None


def test_it_does_not_outlive_a_parent_that_is_killed():
    program = (
        "import time\nfrom llama_tp.bench.neighbour import Neighbour\n"
        "with Neighbour() as neighbour:\n"
        "    with neighbour.busy():\n"
        "        while neighbour.cpu_s < 0.5:  # more than it takes to start\n            time.sleep(0.01)\n"
        "    print(neighbour._process.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert wait_until(lambda: state_of(pid) == "T")
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: state_of(pid) in (None, "Z"))
