"""All routes below /predictions/<model>/<version>/ that generate. The model's own route is the empty one."""

from __future__ import annotations

from llama_tp.serving.dialects.base import Dialect
from llama_tp.serving.dialects.native import NativeDialect
from llama_tp.serving.dialects.openai.routes import openai_dialects
from llama_tp.serving.generation import RequestDefaults


def all_dialects(defaults: RequestDefaults, model_name: str) -> dict[str, Dialect]:
    """The dialects by route."""
    return {"": NativeDialect(defaults), **openai_dialects(defaults, model_name)}
