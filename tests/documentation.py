"""The commands that the README and docs/ give, as a reader finds and types them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_START = re.compile(r"(?:^|[\s/`])llama-tp(?=\s)|-m llama_tp(?=\s)")
_END = {">", "|", "&&", ";"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command of llama-tp, without what a shell makes of it."""

    page: str
    """Its path in the repository."""
    line: int
    words: tuple[str, ...]
    """Behind `llama-tp`."""
    is_in_text: bool
    """In a sentence, where a command is often only named."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words)}"


def block_below(words: str, language: str = "bash") -> str:
    """The README's first block in this language below a heading or words in bold."""
    text = README.read_text()
    behind = text.index(words)
    return next(body for kind, body in _BLOCK.findall(text[behind:]) if kind == language)


def commands() -> list[Command]:
    """Every command of llama-tp on every page, in blocks of whatever language and in sentences."""
    return [command for page in PAGES for command in commands_in(page.read_text(), str(page.relative_to(ROOT)))]


def commands_in(text: str, page: str) -> Iterator[Command]:
    blocks = list(_BLOCK.finditer(text))
    for block in blocks:
        for line, words in _lines(block[2]):
            yield Command(page, _line_of(text, block.start(2)) + line, words, is_in_text=False)
    sentences = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in re.finditer(r"`(llama-tp\s[^`]+)`", sentences):
        yield Command(page, _line_of(sentences, span.start()), _words(span[1].partition("llama-tp")[2]), True)


def _lines(block: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line in the block, words) of its commands. A line of a shell goes on behind a backslash."""
    for match in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", block):
        line = match[0].replace("\\\n", " ")
        for listed in re.findall(r'\["llama-tp", ([^\]]+)\]', line):  # in Kubernetes
            yield _line_of(block, match.start()) - 1, tuple(json.loads(f"[{listed}]"))
        if start := _START.search(line.partition("#")[0]):
            yield _line_of(block, match.start()) - 1, _words(line[start.end() :])


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word in _END]
    return tuple(words[: min(ends, default=None)])


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
