"""The section of scripts/gpu_check.py that starts a TorchServe, on a CPU. The others: tests/distributed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import SCRIPTS

pytestmark = pytest.mark.e2e

SCRIPT = SCRIPTS / "gpu_check.py"


def test_what_torchserve_answers_is_held_to_the_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(SCRIPT), "--cpu-smoke", "--out", str(tmp_path), "--sections", "serve"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    found = json.loads((tmp_path / "gpu_check.json").read_text())["serve"]
    assert found["state"] == "ok", done.stdout[-6000:]
    assert found["right answers"] == ["batch", "stream", "text"]
