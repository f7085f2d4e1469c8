"""The process that renders one chat template, started by `TemplateProcess`: jinja2 and nothing else of this package.

A template comes from a model's publisher, and jinja's sandbox keeps it away from files and objects, but not from loops
and memory: `range(99999)` nested thrice, or `'a' * 10 ** 10`, which jinja evaluates while it compiles.

The first question is {"template": ...}, answered by {} or {"invalid": reason}; then come the variables of one rendering
each, answered by {"rendered": text}, {"refused": message of raise_exception} or {"failed": reason}.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama_tp.text.limited_worker import Limits, serve

LIMITS = Limits(cpu_s=1.0, memory=1 << 30)
"""Published templates take milliseconds to compile and to render, and the largest request that TorchServe accepts needs
a fraction of the memory."""
_NO_MEMORY = f"it needs more than {LIMITS.memory >> 20} MiB of memory"
MAX_RENDERED = 32 * 1024 * 1024
"""Characters of a rendered dialog: several times the largest request."""

_HIDDEN = range(0xD800, 0xE000)
"""Surrogates stand for the first characters of special pieces, so that contents cannot produce these."""
_NOT_PLAIN_ASCII = re.compile(r"[^\x00-~]")


class _TemplateRefusal(TemplateError):
    """Raised by a template's raise_exception."""


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks training targets; its content is rendered as usual."""

    tags = {"generation"}  # noqa: RUF012  # jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """jinja's `namespace` without attributes that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args  # so that `namespace(self=1)` works
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template cannot set the attribute {name!r} of a namespace")


def compile_template(source: str) -> Template:
    """The template in the environment that transformers gives it. TemplateError if it does not compile."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = _PublicNamespace
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With ensure_ascii, everything but hidden characters is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_PLAIN_ASCII.sub(_escaped, text) if ensure_ascii else text


def _escaped(match: re.Match[str]) -> str:
    return match[0] if ord(match[0]) in _HIDDEN else json.dumps(match[0])[1:-1]


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _rendered(template: Template, variables: dict[str, Any]) -> dict[str, str]:
    parts: list[str] = []
    length = 0
    try:
        for part in template.generate(**variables):
            parts.append(part)
            if (length := length + len(part)) > MAX_RENDERED:
                return {"failed": f"the rendered text has more than {MAX_RENDERED} characters"}
        return {"rendered": "".join(parts)}
    except _TemplateRefusal as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": _NO_MEMORY}
    except Exception as error:  # a template can fail in any way
        return {"failed": f"{type(error).__name__}: {error}"}


def _compiled(source: str) -> tuple[dict[str, str], Template | None]:
    try:
        return {}, compile_template(source)
    except TemplateError as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        return {"invalid": f"{line}{error}"}, None
    except MemoryError:
        return {"invalid": _NO_MEMORY}, None
    except Exception as error:  # jinja evaluates constant expressions, which can fail in any way
        return {"invalid": f"{type(error).__name__}: {error}"}, None


class _Renderer:
    """Answers questions."""

    def __init__(self) -> None:
        self._template: Template | None = None

    def __call__(self, question: dict[str, Any]) -> dict[str, str]:
        if self._template is not None:
            return _rendered(self._template, question)
        answer, self._template = _compiled(question["template"])
        return answer


def main() -> None:
    """Answer questions until stdin ends."""
    serve(_Renderer(), LIMITS, {"failed": _NO_MEMORY})


if __name__ == "__main__":
    main()
