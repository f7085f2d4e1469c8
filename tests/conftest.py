"""Fixtures that several kinds of tests share, and which tests may run beside others."""

import os
from pathlib import Path

import pytest

from llama_tp.threads import bound_spinning
from tests.paths import ROOT

PROCESSES = [ROOT / "tests" / "distributed", ROOT / "tests" / "e2e"]
"""Their tests start groups of processes, which take all cores and have deadlines."""


def pytest_configure() -> None:
    """Threads that spin while they wait would take the cores from pytest-xdist's other process."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        bound_spinning(os.environ)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --dist loadgroup one of pytest-xdist's processes runs all that starts processes; unit tests run anywhere."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def tiny_llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama 2 in Meta's files, trained once per run: see tests/tiny_llama2.py."""
    from tests.tiny_llama2 import make_tiny_llama2  # imports torch and transformers, which most tests do without

    return make_tiny_llama2(tmp_path_factory.mktemp("tiny_llama2"))
