"""Render a chat template in a process of its own, whose time and memory are limited."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from llama_tp.text.limited_process import LimitedProcess, ProcessFailure
from llama_tp.text.template_renderer import LIMITS


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class TemplateFailure(Exception):
    """The template failed, or took too much time or memory."""


class TemplateProcess:
    """One compiled template, in a process that starts with the first rendering and ends with this object.

    A rendering costs 0.05 ms more than in this process, the first one 0.1 s, and the process 24 MB. Thread-safe.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._process = LimitedProcess("llama_tp.text.template_renderer", LIMITS, "the chat template")
        self._lock = Lock()

    def check(self) -> None:
        """ValueError if the template does not compile. No process is left."""
        with self._lock:
            self._start()
            self._process.close()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the template with these variables, which must be JSON.

        TemplateRefusal or TemplateFailure with the reason; the next rendering is not affected.
        """
        with self._lock:
            self._start()
            try:
                answer = self._process.ask(variables)
            except ProcessFailure as error:
                answer = {"failed": str(error)}
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        if "failed" in answer:
            raise TemplateFailure(answer["failed"])
        rendered: str = answer["rendered"]
        return rendered

    def close(self) -> None:
        """End the process; another rendering would start it again."""
        with self._lock:
            self._process.close()

    def _start(self) -> None:
        """Start the process, if it is not running, and compile the template. ValueError if it does not compile."""
        if not self._process.start():
            return
        try:
            answer = self._process.ask({"template": self._source})
        except ProcessFailure as error:
            answer = {"invalid": str(error)}
        if "invalid" in answer:
            self._process.close()
            raise ValueError(f"the tokenizer's chat_template does not compile: {answer['invalid']}")
