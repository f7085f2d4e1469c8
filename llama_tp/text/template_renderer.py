"""The process that renders one chat template, started by `TemplateProcess`: jinja2 and nothing else of this package.

A template comes from a model's publisher, and jinja's sandbox keeps it away from files and objects, but not from loops
and memory: `range(99999)` nested thrice, or `'a' * 10 ** 10`, which jinja evaluates while it compiles. So the kernel
sets the limits here: CPU time per line (SIGPROF ends the process, even inside one long C call) and address space.

Protocol: one JSON object a line, in UTF-8 with surrogates. First {"template": ...}, answered by {} or {"invalid":
reason}; then the variables of one rendering a line, answered by {"rendered": text}, {"refused": message of
raise_exception} or {"failed": reason}.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CPU_S = 1.0
"""CPU time to compile the template, and for each rendering. Published templates take milliseconds."""
MAX_MEMORY = 1 << 30
"""Address space of the process in bytes. The largest request that TorchServe accepts needs a fraction."""
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
        return {"failed": f"it needs more than {MAX_MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a template can fail in any way
        return {"failed": f"{type(error).__name__}: {error}"}


def _compiled(source: str) -> tuple[dict[str, str], Template | None]:
    try:
        return {}, compile_template(source)
    except TemplateError as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        return {"invalid": f"{line}{error}"}, None
    except MemoryError:
        return {"invalid": f"it needs more than {MAX_MEMORY >> 20} MiB of memory"}, None
    except Exception as error:  # jinja evaluates constant expressions, which can fail in any way
        return {"invalid": f"{type(error).__name__}: {error}"}, None


def _limited(step: Callable[[], Any]) -> Any:
    """The result of `step`. The kernel ends the process if it takes more than MAX_CPU_S."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    result = step()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return result


def main() -> None:
    """Answer the lines of stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes stdin
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # a lower hard limit applies already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    source = json.loads(sys.stdin.buffer.readline())["template"]
    answer, template = _limited(lambda: _compiled(source))
    _answer(answer)
    if template is None:
        return
    for line in sys.stdin.buffer:
        variables = json.loads(line)
        _answer(_limited(lambda: _rendered(template, variables)))  # noqa: B023  # called at once


def to_line(message: Mapping[str, Any]) -> bytes:
    """The message as a line of JSON. Surrogates are written as they are: if they were escaped, the reader would join
    some pairs to one character."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _answer(answer: dict[str, str]) -> None:
    try:
        line = to_line(answer)
    except MemoryError:
        line = to_line({"failed": f"it needs more than {MAX_MEMORY >> 20} MiB of memory"})
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
