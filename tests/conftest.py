"""Fixtures that several kinds of tests share, and which tests run beside others under pytest-xdist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from llama_tp.model.cpu.build import build_kernels
from llama_tp.threads import bound_spinning

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling

STARTING_PROCESSES = ("tests/distributed/", "tests/e2e/")
"""Tests that start groups of processes, which take all cores and have deadlines: they run one after the other."""
LIGHT = "tests/e2e/test_chat_page.py"
"""A browser and a server that only pretends to generate: runs beside them."""


def pytest_configure() -> None:
    """Bound spinning: threads that spin while they wait would take the cores from pytest-xdist's other process. And
    compile the kernels: an engine that switches to them during a test would be another one in each run. Property tests
    have no time limits of their own: a machine that stalls for 0.2 s is no counterexample. In CI they have the same
    examples in each run, elsewhere new ones."""
    slow, is_ci = [HealthCheck.too_slow], "CI" in os.environ
    settings.register_profile(
        "untimed", parent=settings(), deadline=None, suppress_health_check=slow, derandomize=is_ci
    )
    settings.load_profile("untimed")
    if "PYTEST_XDIST_WORKER" in os.environ:
        bound_spinning(os.environ)
    else:
        build_kernels().wait()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """One of its processes runs all that starts processes, the others everything else, test by test.

    Not by --dist loadgroup, which forgets its groups under pytest 9.2 (pytest-xdist#1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(LIGHT):
                return LIGHT
            return "starting processes" if nodeid.startswith(STARTING_PROCESSES) else nodeid

    return Scheduler(config, log)


@pytest.fixture(scope="session")
def tiny_llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama 2 in Meta's files, trained once per run: see tests/tiny_llama2.py."""
    from tests.tiny_llama2 import make_tiny_llama2  # imports torch and transformers, which most tests do without

    return make_tiny_llama2(tmp_path_factory.mktemp("tiny_llama2"))
