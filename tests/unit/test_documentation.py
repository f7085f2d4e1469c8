"""What the documentation has readers type is what the command line understands, and what it links to is there."""

from __future__ import annotations

import inspect
import re
from functools import wraps

import pytest

from llama_tp.cli import main as cli
from tests.documentation import README, Command, commands, commands_in
from tests.paths import ROOT

PAGE = """
Ask `llama-tp health`, or `llama-tp
stop --port 9000` it; `llama-tp` explains itself.

```bash
$ llama-tp plan "my args.json" --memory 24GiB | cat  # llama-tp verify
    ExecStart=/srv/bin/llama-tp serve
torchrun --nproc-per-node 2 \\
    -m llama_tp generate folder \\
    "Once upon"
```

```yaml
exec: {command: ["llama-tp", "health", "--port", "9000"]}
```
"""


def test_commands_are_found_wherever_a_page_gives_them():
    assert [(one.line, *one.words) for one in commands_in(PAGE, "page") if not one.is_in_text] == [
        (6, "plan", "my args.json", "--memory", "24GiB"),
        (7, "serve"),
        (8, "generate", "folder", "Once upon"),
        (14, "health", "--port", "9000"),
    ]
    in_text = [(2, "health"), (2, "stop", "--port", "9000")]
    assert [(one.line, *one.words) for one in commands_in(PAGE, "page") if one.is_in_text] == in_text
    assert {one.page for one in commands()} >= {"README.md", "docs/benchmarks.md", "docs/operations.md"}


def recording(entry, calls):
    """The same command line, where every command only notes its name."""
    if isinstance(entry, dict):
        return {name: recording(one, calls) for name, one in entry.items()}

    @wraps(entry)
    def record(*args, **kwargs):
        calls.append(inspect.signature(entry).bind(*args, **kwargs))

    return record


@pytest.fixture
def why_not(run, monkeypatch):
    """What the command line has against a command; None if it would run it."""
    calls = []
    monkeypatch.setattr(cli, "COMMANDS", recording(cli.COMMANDS, calls))

    def ask(command):
        code, out, err = run(*command.words)
        return None if code == 0 and len(calls) == 1 else f"{command}: {out}{err}"

    return ask


def is_only_named(command):
    """As in: `llama-tp verify` reads every byte."""
    entry = cli.COMMANDS
    for word in command.words:
        entry = entry.get(word) if isinstance(entry, dict) else None
    return command.is_in_text and entry is not None


@pytest.mark.parametrize("command", commands(), ids=str)
def test_every_command_of_the_documentation_exists_with_all_its_arguments(why_not, command):
    assert is_only_named(command) or why_not(command) is None


@pytest.mark.parametrize(
    "words",
    ["sreve", "serve --prot 8080", "plan", "plan args.json 24GiB bfloat16 8 more", "bench", "bench quality"],
)
def test_a_command_that_does_not_exist_would_be_noticed(why_not, words):
    command = Command("page", 1, tuple(words.split()), is_in_text=False)
    assert not is_only_named(command)
    assert why_not(command) is not None


def test_the_documentation_has_no_gaps_and_its_links_lead_somewhere():
    pages = [README, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        assert "@@" not in text, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page}: {link}"
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["index.md"]
