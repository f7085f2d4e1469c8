"""Options of a command that can also be set by the environment and by a file.

The command line wins over LLAMA_TP_* variables, those over the file that --config names, and that over the defaults.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

PREFIX = "LLAMA_TP_"
_OTHERS = ("LLAMA_TP_CACHE", "LLAMA_TP_SERVE_PORT", "LLAMA_TP_SERVE_FILES")
"""Variables that are no options. Those of the project's tests begin with LLAMA_TP_TEST."""
_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


class WrongArguments(ValueError):
    """Arguments that no command can be run with, as opposed to a command that fails."""


def configurable(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take options that the command line omits from the environment and from a file, and check the types of all.

    `names`: those that are taken; without names, all. The function's options are keyword-only, except its argument,
    which may be omitted. If it has an option `config`, that is the file. WrongArguments for values of other types than
    the function's annotations allow. Errors of the function that name an option say where its value is from.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        options = inspect.signature(function, eval_str=True).parameters
        configured = {name: option for name, option in options.items() if not names or name in names}

        @wraps(function)
        def call(*args: Any, **given: Any) -> None:
            positional = {name: value for name, value in zip(options, args, strict=False) if value is not None}
            typed = _checked(given | positional, options, _flag)
            of_environment = _from_environment(configured)
            settings = of_environment | typed
            of_file = {}
            if path := settings.get("config"):
                of_file = _from_file(str(path), configured)
            origins = dict.fromkeys(of_file, f"set in {path}")
            origins |= {name: f"set by {_variable(name)}" for name in of_environment}
            origins = {name: origin for name, origin in origins.items() if name not in typed}
            with _naming(origins):
                function(**of_file | settings)

        return call

    return decorate


def warn_of_unknown_variables(options: Iterable[str]) -> None:
    """Name, on stderr, variables that look like options and are none, so that a misspelled one is noticed."""
    known = [*(_variable(name) for name in options), *_OTHERS]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(f"{PREFIX}TEST"):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see `llama-tp serve --help`"
            print(f"the variable {name} has no effect: there is no such option{hint}", file=sys.stderr)


@contextmanager
def _naming(origins: Mapping[str, str]) -> Iterator[None]:
    """Add to errors that name options, as `--port` or `port=`, where their values are from, if they were not typed."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = str(error)
        for name, origin in origins.items():
            if re.search(rf"(?<![\w-])({_flag(name)}(?![\w-])|{name}=)", message):
                error.args = (f"{error}; {_flag(name)} is {origin}",)
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _from_environment(options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    texts = {name: os.environ[_variable(name)] for name in options if os.environ.get(_variable(name))}
    values = {name: text if _is_text(options[name]) else _parsed(text) for name, text in texts.items()}
    return _checked(values, options, _variable)


def _from_file(path: str, options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongArguments(f"--config {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise WrongArguments(f"--config {path} is not a YAML file: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise WrongArguments(f"--config {path} must be a mapping of options to values, such as `port: 8080`")
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    known = [name for name in options if name != "config"]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"options: {', '.join(known)}"
            raise WrongArguments(f"{name} in {path} is not an option; {hint}")
    values = {name: value for name, value in values.items() if value is not None}
    texts = {name: str(value) for name, value in values.items() if _is_text(options[name]) and _is_scalar(value)}
    return _checked(values | texts, options, lambda name: f"{name} in {path}")


def _checked(
    values: Mapping[str, Any], options: Mapping[str, inspect.Parameter], say: Callable[[str], str]
) -> dict[str, Any]:
    """The values. WrongArguments, which calls an option what `say` makes of its name, if one has the wrong type."""
    for name, value in values.items():
        allowed = _types(options[name])
        kinds = (*allowed, int) if float in allowed else allowed
        if type(value) not in kinds and not (value is None and NoneType in allowed):
            words = " or ".join(_WORDS[kind] for kind in allowed if kind is not NoneType)
            shown = "the value" if name == "api_key" else repr(value)
            raise WrongArguments(f"{say(name)}: {shown} must be {words}")
    return dict(values)


def _types(option: inspect.Parameter) -> tuple[type, ...]:
    return get_args(option.annotation) or (option.annotation,)


def _is_text(option: inspect.Parameter) -> bool:
    return set(_types(option)) <= {str, NoneType}


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _parsed(text: str) -> object:
    """A value as in the file: `true`, 8080, 2.5, auto."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _variable(name: str) -> str:
    return PREFIX + name.upper()
