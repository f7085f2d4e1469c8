"""`--tp N` gives the answer of one rank, from N of them that the command starts itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.tiny_converted import convert_beside, write_originals

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    originals = write_originals(tmp_path_factory.mktemp("model") / "originals", num_shards=2)
    return convert_beside(originals, max_seq_len=128)


def llama_tp(*words, stdin=""):
    """A finished command: its output, and what it says on stderr."""
    command = [sys.executable, "-m", "llama_tp", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, done.stderr


def test_two_ranks_continue_a_prompt_as_one_does(checkpoint):
    words = ("generate", str(checkpoint), "Hello", "--max_new_tokens=16", "--dtype=float32", "--device=cpu")
    alone, _ = llama_tp(*words, "--tp=auto")
    together, errors = llama_tp(*words, "--tp=2")
    assert together == alone
    assert "Setting OMP_NUM_THREADS" not in errors


def test_the_terminal_is_the_leaders(checkpoint):
    words = (
        "chat",
        str(checkpoint),
        "--chat_format=llama2",
        "--temperature=0",
        "--max_new_tokens=8",
        "--dtype=float32",
    )
    alone, _ = llama_tp(*words, stdin="Hello\nAgain\n")
    together, _ = llama_tp(*words, "--tp=2", stdin="Hello\nAgain\n")
    assert together == alone != ""
