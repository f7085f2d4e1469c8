"""Fixtures that several end-to-end tests share."""

from pathlib import Path

import pytest

from llama_tp.checkpoint.demo import make_demo


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama-tp demo` makes, with weights/ and converted_checkpoints/: a real model. Not to be written to."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder)
    return folder
