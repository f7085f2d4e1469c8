"""Fixtures that several kinds of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama 2 in Meta's files, trained once per run: see tests/tiny_llama2.py."""
    from tests.tiny_llama2 import make_tiny_llama2  # imports torch and transformers, which most tests do without

    return make_tiny_llama2(tmp_path_factory.mktemp("tiny_llama2"))
