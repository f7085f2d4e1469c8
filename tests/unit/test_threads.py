"""Threads follow the cores that a rank may really use, in a container, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llama_tp import control_groups, threads

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A host of eight cores without control groups."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _pid: set(range(8)))


@pytest.fixture
def files(tmp_path):
    def write(contents):
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("contents", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # the parent's quota binds, too
        (
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "400000 100000\n",
            },
            4,
        ),
        # version 1, as Docker mounts it: the path is the host's, the mount is the container's
        (
            {
                "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_every_quota(files, contents, cores):
    files(contents)
    assert threads.available_cores() == cores


STATISTICS = "anon 1000\ninactive_file 300\ntotal_inactive_file 300\n"


@pytest.mark.parametrize(
    ("contents", "free"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, []),
        (
            {
                "proc/self/cgroup": "0::/pod\n",
                "sys/fs/cgroup/pod/memory.max": "5000\n",
                "sys/fs/cgroup/pod/memory.current": "1300\n",
                "sys/fs/cgroup/pod/memory.stat": STATISTICS,
            },
            [4000],
        ),
        (
            {
                "proc/self/cgroup": "3:memory:/docker/1f\n2:cpu:/docker/1f\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1400\n",
                "sys/fs/cgroup/memory/memory.stat": STATISTICS,
            },
            [0],
        ),
    ],
)
def test_free_memory_is_what_every_limit_leaves_cached_files_aside(files, contents, free):
    files(contents)
    assert list(control_groups.free_memory()) == free


@pytest.mark.parametrize(
    ("environment", "requested", "expected"),
    [
        ({}, None, 8),
        ({"LOCAL_WORLD_SIZE": "3"}, None, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, None, 1),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "64"}, None, 8),
        ({"OMP_NUM_THREADS": "4,2"}, None, 4),
        ({"OMP_NUM_THREADS": ""}, None, 8),
        ({"OMP_NUM_THREADS": "64"}, 2, 2),
        # torchrun's own default
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None, 4),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None, 2),
    ],
)
def test_a_rank_gets_its_share_of_the_cores_unless_told_otherwise(monkeypatch, environment, requested, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads.choose_num_threads(requested) == expected


def test_a_number_of_threads_that_is_not_used_is_said(monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    threads.choose_num_threads(None)
    assert caplog.messages == ["OMP_NUM_THREADS=64 exceeds the 8 core(s) of this rank; using 8"]


def test_what_the_user_says_of_spinning_stands():
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(given)
        threads.bound_spinning(environment)
        assert environment == given


def test_unbounded_spinning_is_said_once_there_are_threads_that_wait(monkeypatch, caplog):
    threads.warn_of_spinning(1)
    assert not caplog.messages
    threads.warn_of_spinning(2)
    assert "GOMP_SPINCOUNT=1000" in caplog.messages[0]


def test_the_command_bounds_the_spinning_before_openmp_is_loaded():
    """libgomp itself is the oracle: it prints the settings it has read."""
    code = "from llama_tp.cli import main as cli; cli.run_command = lambda *_, **__: None; cli.main(); import torch"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
