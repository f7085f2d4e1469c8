"""The programs in examples/ do what they say, with the demo's real weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.demo_answers import QUESTION
from tests.paths import ROOT

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(demo_folder: Path) -> Path:
    return demo_folder / "converted_checkpoints"


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_prompts_are_completed_alike_on_one_rank_and_on_three(checkpoint: Path) -> None:
    alone = run("examples/offline.py", str(checkpoint))
    assert "1, 2, 3, 4, 5, 6" in alone
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0"]
    torchrun += ["--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    together = run(*torchrun, "examples/offline.py", str(checkpoint))
    assert "1, 2, 3, 4, 5, 6" in together
    assert together.count("\n") == 2, "the leader alone prints"


def test_a_conversation_goes_on(checkpoint: Path) -> None:
    said = run("examples/chat.py", str(checkpoint), QUESTION, "And of Italy?")
    assert "Paris" in said
    assert "Rome" in said
