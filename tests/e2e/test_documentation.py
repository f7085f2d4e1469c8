"""The commands of the documentation do what they say: those that need no server, each in a folder of its own.

Those around a server are pasted as they are by test_serve.py and typed by test_wheel.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_tp.checkpoint.demo import extract_gguf
from tests.documentation import Command, block_below, commands
from tests.e2e.demo_answers import QUESTION
from tests.paths import CONFIGS, ROOT
from tests.tiny_converted import convert_beside, write_originals

pytestmark = pytest.mark.e2e

WITH_A_SERVER = {("serve",), ("stop",), ("health",), ("follow",), ("bench", "serve")}
UNDER_TORCHRUN = {("bench", "comm")}
TOO_LARGE = {("bench", "checkpoint"), ("bench", "compare"), ("bench", "quality"), ("bench", "micro")}
"""Minutes, or 6 GB on disk; the unit tests of the same names run them on a few MB."""


def needs_the_hub(words: tuple[str, ...]) -> bool:
    """test_hub.py tests downloads, and conversions of what is downloaded, with a stand-in."""
    return words[:1] == ("download",) or (words[:1] == ("convert",) and words[1].startswith("meta-llama/"))


COMMANDS = {
    one.words: one
    for one in commands()
    if not {one.words[:1], one.words[:2]} & (WITH_A_SERVER | UNDER_TORCHRUN | TOO_LARGE)
    if not one.is_in_text or len(one.words) > 1
    if not needs_the_hub(one.words)
    if "--random-weights" not in one.words  # of a billion parameters
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with originals/, converted/ and model_args.json, for what takes too long with the demo."""
    originals = write_originals(tmp_path_factory.mktemp("tiny") / "originals")
    convert_beside(originals)
    return originals.parent


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as its publisher has it."""
    return extract_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def reader(tmp_path: Path, demo_folder: Path, gguf: Path, tiny: Path) -> Path:
    """The folder that a reader works in."""
    (tmp_path / "demo").symlink_to(demo_folder)
    (tmp_path / gguf.name).symlink_to(gguf)
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo" / "converted_checkpoints").symlink_to(tiny / "converted")
    (tmp_path / "model_args.json").symlink_to(tiny / "model_args.json")
    (tmp_path / "model-config.yaml").symlink_to(CONFIGS / "demo-cpu.yaml")
    return tmp_path


def _no_cache_of_the_user(arguments: tuple[str, ...]) -> dict[str, str]:
    return {"LLAMA_TP_CACHE": "empty"} if "cache" in arguments else {}


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **_no_cache_of_the_user(arguments)},
        input=f"{QUESTION}\n",
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS.values(), ids=str)
def test_a_command_that_needs_no_server_runs_as_it_is_written(reader: Path, tiny: Path, command: Command) -> None:
    meant = {"$D": str(tiny / "originals"), "CHECKPOINT": ".demo/converted_checkpoints", "R": "inf"}
    meant["TOKENIZER"] = meant["CHECKPOINT"]
    words = [meant.get(word, word) for word in command.words]
    if words[0] == "verify":
        (reader / "converted_checkpoints").symlink_to(tiny / "converted")
    if "model_store/llama/converted_checkpoints" in words:
        (reader / "model_store" / "llama").mkdir(parents=True)
        (reader / "model_store" / "llama" / "converted_checkpoints").symlink_to(tiny / "converted")
    said = run(reader, "-m", "llama_tp", *words)
    assert said or words[0] == "convert"


def test_the_program_of_the_readme_says_what_the_readme_has_it_say(reader: Path) -> None:
    """As far as every machine says the same in bfloat16."""
    said = run(reader, "-c", block_below("## In Python", "python"))
    expected = block_below("## In Python", "console")
    assert said.count("\n") == expected.count("\n") == 1
    assert said.startswith("Once upon a time,")
    assert expected.startswith("Once upon a time,")
