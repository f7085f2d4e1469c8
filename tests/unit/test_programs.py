"""TorchServe's programs are found where pip puts them, with and without a virtual environment."""

from __future__ import annotations

import sys
import sysconfig

import pytest

from llama_tp.torchserve.programs import program


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A Python in usr/bin whose pip writes into usr/local/bin, as Debian's does, and with --user into home/bin."""
    made = {name: tmp_path / name / "bin" for name in ("usr", "local", "home")}
    for folder in made.values():
        folder.mkdir(parents=True)
    user = sysconfig.get_preferred_scheme("user")
    monkeypatch.setattr(sys, "executable", str(made["usr"] / "python3"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _, scheme="": str(made["home" if scheme == user else "local"]))
    return made


@pytest.mark.parametrize("folder", ["usr", "local", "home"])
def test_a_program_is_found_beside_python_or_where_pip_installs(folders, folder):
    """Only the first was looked into: on Debian without a virtual environment, TorchServe was said to be missing."""
    path = folders[folder] / "torchserve"
    path.touch()
    assert program("torchserve") == path


def test_a_virtual_environment_comes_before_the_user_s_own_folder(folders):
    for folder in folders.values():
        (folder / "torchserve").touch()
    assert program("torchserve") == folders["usr"] / "torchserve"


def test_a_program_that_is_nowhere_is_expected_beside_python(folders):
    assert program("torchserve") == folders["usr"] / "torchserve"
