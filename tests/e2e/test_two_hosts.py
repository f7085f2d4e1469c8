"""TorchServe on one host, `torchrun ... -m llama_tp follow` in a loop on another; here both are one machine."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.torchserve_rig import (
    MARK,
    TorchServe,
    convert,
    environment,
    free_ports,
    is_gone,
    kill_all,
    package,
    processes_marked,
    serve,
    variable_of,
)
from tests.tiny_llama2 import LONG_REQUEST, PASSAGE_REQUEST, REST_OF_PASSAGE
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

TIMEOUT_S = 8.0
NOTICED_WITHIN_S = TIMEOUT_S + 20
"""Less than half of responseTimeout, after which TorchServe would end the group."""


class SecondHost:
    """A host that follows and does so again whenever its group has ended, as the README has it."""

    def __init__(self, model_dir: Path, *, endpoint: str, rdzv_id: str) -> None:
        self._log = model_dir / "follow.log"
        self._mark = uuid.uuid4().hex
        command = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", rdzv_id]
        command += ["--rdzv-conf", "is_host=0"]  # or it might be the one that others meet at: it has that host's name
        command += ["-m", "llama_tp", "follow", "--config", str(model_dir / "model-config.yaml")]
        with open(self._log, "wb") as log:
            self._shell = subprocess.Popen(
                ["bash", "-c", f"while true; do {shlex.join(command)}; sleep 1; done"],
                env={**environment(), MARK: self._mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        return processes_marked(self._mark)

    def rank(self) -> psutil.Process:
        """The one that computes."""
        (found,) = (process for process in self.processes() if variable_of(process, "LOCAL_RANK"))
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> list[psutil.Process]:
        """End the loop as Ctrl-C or systemd would. What had to be killed after some seconds."""
        os.killpg(self._shell.pid, signal.SIGTERM)
        self._shell.wait(PATIENCE_S)
        wait_until(lambda: not self.processes(), timeout_s=25)
        left = self.processes()
        kill_all(left)
        return left


@contextmanager
def second_host(model_dir: Path, *, endpoint: str, rdzv_id: str) -> Iterator[SecondHost]:
    host = SecondHost(model_dir, endpoint=endpoint, rdzv_id=rdzv_id)
    try:
        yield host
    finally:
        left = host.stop()
    assert not left, f"the second host was told to stop, but left behind: {left}"


@pytest.fixture(scope="module")
def endpoint() -> str:
    return f"localhost:{free_ports(1)[0]}"


@pytest.fixture(scope="module")
def store(tiny_llama2: Path, tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Path:
    work = tmp_path_factory.mktemp("model")
    convert(tiny_llama2, work)
    torchrun = {"nnodes": 2, "nproc-per-node": 1, "rdzv-endpoint": endpoint, "OMP_NUMBER_THREADS": 1}
    handler = {"collective_timeout_s": TIMEOUT_S, "heartbeat_s": 0.5, "max_seq_len": 4096}
    return package(work, config={"torchrun": torchrun}, handler=handler)


@pytest.fixture(scope="module")
def hosts(
    store: Path, tmp_path_factory: pytest.TempPathFactory, endpoint: str
) -> Iterator[tuple[TorchServe, SecondHost]]:
    """READY, with a copy of the model folder on the second host."""
    copy = shutil.copytree(store / "llama", tmp_path_factory.mktemp("second_host") / "llama")
    start = time.monotonic()
    with (
        serve(store, tmp_path_factory.mktemp("torchserve"), wait=False) as server,  # READY only when the other is there
        second_host(copy, endpoint=endpoint, rdzv_id=f"llama_{server.distribution_port}") as other,
    ):
        try:
            server.wait_ready()
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- second host\n{other.log()[-4000:]}") from None
        print(f"READY after {time.monotonic() - start:.1f} s\n", end="")
        yield server, other


def test_two_hosts_recite_the_passage_to_the_letter_streamed_or_not(hosts: tuple[TorchServe, SecondHost]) -> None:
    server, other = hosts

    whole = server.post(PASSAGE_REQUEST)
    with server.stream({**PASSAGE_REQUEST, "stream": True}) as stream:
        chunks = [chunk for _, chunk in stream]

    assert whole.status == 200, whole.body
    assert whole.json()["text"] == REST_OF_PASSAGE
    assert "".join(chunk["text"] for chunk in chunks) == REST_OF_PASSAGE
    assert chunks[-1]["usage"] == whole.json()["usage"]
    assert len(server.ranks()) == 1
    assert server.ranks()[0].environ()["WORLD_SIZE"] == other.rank().environ()["WORLD_SIZE"] == "2"
    assert "loaded; following the leader (GroupComm)" in other.log()


def test_torchserve_names_the_group_after_the_model_and_its_port(hosts: tuple[TorchServe, SecondHost]) -> None:
    server, _ = hosts
    command = server.agent().cmdline()
    assert command[command.index("--rdzv-id") + 1] == f"llama_{server.distribution_port}"


def wait_until_both_serve_again(server: TorchServe, leader: psutil.Process, follower: psutil.Process) -> None:
    """The group ends as a whole, TorchServe notices, and a new group is READY."""
    for process in (leader, follower):
        assert wait_until(lambda process=process: is_gone(process))
    # This process may be too slow to see that it is not READY: then there is another leader.
    assert wait_until(lambda: not server.is_ready() or server.ranks().get(0, leader) != leader)
    server.wait_ready()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda how: how.name)
def test_when_a_follower_is_lost_streams_end_and_both_hosts_serve_again(
    hosts: tuple[TorchServe, SecondHost], how: signal.Signals
) -> None:
    server, other = hosts
    leader, follower = server.ranks()[0], other.rank()
    with server.stream(LONG_REQUEST) as stream:
        next(iter(stream))

        follower.send_signal(how)
        lost = time.monotonic()

        assert stream.how_it_ends() == "cut off"
        noticed_s = time.monotonic() - lost
    assert noticed_s < NOTICED_WITHIN_S
    if how is signal.SIGSTOP:
        follower.kill()  # nothing else ends it, least of all the agent that waits for it

    wait_until_both_serve_again(server, leader, follower)
    again_s = time.monotonic() - lost
    assert server.post(PASSAGE_REQUEST).json()["text"] == REST_OF_PASSAGE
    print(f"{how.name}: noticed after {noticed_s:.2f} s, READY after {again_s:.1f} s\n", end="")


def test_a_lost_leader_is_one_line_on_the_follower_which_then_follows_the_next(
    hosts: tuple[TorchServe, SecondHost],
) -> None:
    server, other = hosts
    leader, follower = server.ranks()[0], other.rank()
    before = len(other.log())

    leader.kill()

    wait_until_both_serve_again(server, leader, follower)
    assert server.post(PASSAGE_REQUEST).json()["text"] == REST_OF_PASSAGE
    lines = [line for line in other.log()[before:].splitlines() if " CRITICAL " in line]
    assert len(lines) == 1
    assert ": exiting: " in lines[0]
    assert "exitcode  : 70" in other.log()[before:]
