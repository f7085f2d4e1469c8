"""Ranks find each other before any of them touches a device, and all of them hear what is wrong with one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.torchrun import TIMEOUT_S, check, torchrun
from tests.e2e.torchserve_rig import is_gone
from tests.paths import ROOT
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.distributed


def results(case: str, folder: object = "") -> list[dict]:
    """What each of two ranks heard."""
    done = torchrun(2, "tests.distributed.meet_worker", case, str(folder))
    check(done)
    found = [json.loads(line) for line in re.findall(r"RESULT (\{.*?\})", done.stdout)]
    assert sorted(one["rank"] for one in found) == [0, 1]
    return found


def test_all_ranks_hear_at_once_that_one_has_no_gpu():
    for one in results("no_device"):
        assert one["heard"].startswith("rank 1: device=cuda: local rank 1 needs GPU number 1, but only 0 are visible")
        assert one["seconds"] < 30


def test_ranks_of_different_kinds_of_device_are_refused():
    for one in results("kinds"):
        assert "rank 0: cpu, rank 1: cuda; set device to cpu or cuda" in one["heard"]


def test_all_ranks_hear_of_one_bad_configuration(tmp_path):
    for one in results("bad_config", tmp_path):
        assert "rank 1: " in one["heard"]
        assert "batchSise is not a known key; did you mean batchSize?" in one["heard"]
        assert one["seconds"] < 30


def test_ranks_of_one_host_listen_on_loopback_only():
    """torchrun's own agent does not: docs/operations.md says how to close its port. The interface is checked as well:
    without it, gloo still listens on loopback where the host's name resolves to 127.0.0.1."""
    for one in results("sockets"):
        assert one["heard"] == ["127.0.0.1", "lo"]


def test_ranks_meet_behind_scripts_that_start_them(tmp_path):
    """Each of them waited for the others at a place of its own."""
    script = tmp_path / "wrapper.sh"
    script.write_text(f'#!/bin/sh\n{sys.executable} -m tests.distributed.meet_worker sockets ""\nexit $?\n')
    script.chmod(0o755)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1", "--no-python", str(script)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    check(done)
    assert done.stdout.count('"heard": ["127.0.0.1", "lo"]') == 2


def test_a_rank_that_waits_in_a_collective_ends_at_sigterm(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.distributed.meet_worker", "stuck", str(tmp_path)]
    agent = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        file = tmp_path / "pid0"
        assert wait_until(lambda: file.exists() and file.read_text(), TIMEOUT_S), "the ranks did not start"
        rank = psutil.Process(int((tmp_path / "pid0").read_text()))
        time.sleep(1)  # until it waits in the collective
        rank.send_signal(signal.SIGTERM)
        assert wait_until(lambda: is_gone(rank))
    finally:
        agent.terminate()
        agent.wait(PATIENCE_S)
