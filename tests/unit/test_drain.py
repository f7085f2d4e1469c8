"""The end of a server: requests finish, or do not, and nothing is left, however the command ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llama_tp.torchserve import foreground
from llama_tp.torchserve.drain import ANSWER_FOLDER, drain, drain_on_demand, forget_drain
from llama_tp.torchserve.processes import MARK, is_alive
from llama_tp.torchserve.server import free_ports
from llama_tp.torchserve.watchdog import Watchdog
from tests.waiting import PATIENCE_S, wait_until


class Service:
    """One that is told when its requests have ended."""

    is_idle = False
    is_draining = False

    def drain(self):
        self.is_draining = True


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv(ANSWER_FOLDER, str(tmp_path))
    service = Service()
    drain_on_demand(service)
    yield service
    service.is_idle = True


def test_a_drained_server_has_refused_new_requests_and_finished_the_open_ones(service, tmp_path):
    assert not service.is_draining
    meanwhile = []
    found = []
    asking = threading.Thread(target=lambda: found.append(drain(tmp_path, 30, lambda: meanwhile.append(1))))
    asking.start()
    assert wait_until(lambda: service.is_draining and meanwhile)
    assert not found
    service.is_idle = True
    asking.join(PATIENCE_S)
    assert found == [True]


def test_a_drain_does_not_take_longer_than_it_may(service, tmp_path):
    assert not drain(tmp_path, 0.5)
    assert wait_until(lambda: service.is_draining)


def test_a_server_that_still_loads_is_not_waited_for(tmp_path):
    start = time.monotonic()
    assert not drain(tmp_path, 30)
    assert time.monotonic() - start < 10


def test_an_earlier_server_s_drain_does_not_end_the_next_one(tmp_path, monkeypatch):
    for name in ("led", "drain", "drained"):
        (tmp_path / name).touch()
    forget_drain(tmp_path)
    assert list(tmp_path.iterdir()) == []
    forget_drain(tmp_path)


def test_a_server_that_was_started_by_hand_is_not_watched(monkeypatch):
    monkeypatch.delenv(ANSWER_FOLDER, raising=False)
    before = threading.enumerate()  # those of earlier tests may end meanwhile
    drain_on_demand(Service())
    assert [thread for thread in threading.enumerate() if thread not in before] == []


class Server:
    """What a command does with its server, step by step. `ends`: what interrupts each step."""

    def __init__(self, **ends):
        self.ends = ends
        self.steps = []

    def _step(self, name, text):
        self.steps.append(text)
        if (end := self.ends.pop(name, None)) is not None:
            raise end

    def wait_until_ended(self):
        self._step("wait", "wait")

    def drain(self, timeout_s):
        self._step("drain", f"drain {timeout_s}")
        return True

    def stop(self, grace_s=20):
        self._step("stop", f"stop {grace_s}")


@pytest.mark.parametrize(
    ("ends", "drain_s", "steps"),
    [
        ({"wait": KeyboardInterrupt()}, 5, ["wait", "drain 5", "stop 20"]),
        ({"wait": SystemExit(143)}, 5, ["wait", "drain 5", "stop 20"]),
        ({"wait": KeyboardInterrupt()}, 0, ["wait", "stop 20"]),
        ({"wait": KeyboardInterrupt(), "drain": KeyboardInterrupt()}, 5, ["wait", "drain 5", "stop 0", "stop 20"]),
        ({"wait": KeyboardInterrupt(), "stop": SystemExit(143)}, 0, ["wait", "stop 20", "stop 0"]),
        ({"wait": OSError("it has exited")}, 5, ["wait", "stop 20"]),
    ],
    ids=["ctrl-c", "sigterm", "without draining", "twice", "while stopping", "exited"],
)
def test_the_first_signal_drains_and_the_second_kills(ends, drain_s, steps):
    end = type(ends["wait"])
    server = Server(**ends)
    with pytest.raises(end):
        foreground.run_until_ended(server, drain_s)
    foreground.end(server)
    assert server.steps == steps


FRONTEND = [sys.executable, "-c", "import time; time.sleep(120)", "org.pytorch.serve.ModelServer"]
COMMAND = """
import sys, time
from llama_tp.torchserve.watchdog import Watchdog
Watchdog(int(sys.argv[1]))
print("watched", flush=True)
time.sleep(120)
"""


def test_a_server_ends_with_its_command_even_if_that_is_killed():
    (port,) = free_ports(1)
    server = subprocess.Popen(FRONTEND, env={**os.environ, MARK: str(port), "TEMP": "/nowhere"})
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert command.stdout.readline() == "watched\n"
        assert server.poll() is None
        command.send_signal(signal.SIGKILL)
        command.wait()
        assert server.wait(PATIENCE_S) == -signal.SIGTERM
    finally:
        server.kill()
        command.kill()


def test_a_watchdog_that_is_dismissed_is_gone_and_leaves_the_server_alone():
    (port,) = free_ports(1)
    server = subprocess.Popen(FRONTEND, env={**os.environ, MARK: str(port), "TEMP": "/nowhere"})
    try:
        watchdog = Watchdog(port)
        pid = watchdog._process.pid
        watchdog.dismiss()
        assert not is_alive(pid)
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()
