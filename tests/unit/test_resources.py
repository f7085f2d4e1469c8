"""Handler and configurations are found in the repository and in a wheel, wherever somebody stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_tp import resources
from tests.paths import CONFIGS, ROOT

NAMES = (resources.HANDLER, resources.PROPERTIES, resources.LOG_CONFIG)
FIND = (
    "from llama_tp import resources as r; print(*map(r.resource, (r.HANDLER, r.PROPERTIES, r.LOG_CONFIG)), sep='\\n')"
)


@pytest.fixture
def site_packages(tmp_path):
    """The package as a wheel installs it, beside somebody else's folder of the same name."""
    folder = tmp_path / "site-packages"
    shutil.copytree(ROOT / "llama_tp", folder / "llama_tp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("handler", "configs"):
        shutil.copytree(ROOT / name, folder / "llama_tp" / name)
    (folder / "configs").mkdir()
    (folder / "configs" / "config.properties").write_text("somebody else's")
    return folder


def found_from(path, cwd):
    """The resources of the package on a path, as seen by a process elsewhere."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", FIND], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


def test_in_the_repository_they_lie_beside_the_package(tmp_path):
    assert found_from(ROOT, tmp_path) == [ROOT / name for name in NAMES]
    assert all((ROOT / name).is_file() for name in NAMES)


def test_in_a_wheel_they_lie_inside_of_the_package(site_packages, tmp_path):
    found = found_from(site_packages, tmp_path)
    assert found == [site_packages / "llama_tp" / name for name in NAMES]
    assert all(path.is_file() for path in found)


def test_every_file_of_configs_is_listed():
    files = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file()}
    assert "config.production.properties" in files
    assert set(resources.configurations()) == files
