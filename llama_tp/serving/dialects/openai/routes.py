"""The routes of OpenAI's API, below /predictions/<model>/<version>/."""

from __future__ import annotations

import time

from llama_tp.serving.dialects.base import Dialect
from llama_tp.serving.dialects.openai.chat import ChatDialect
from llama_tp.serving.dialects.openai.completions import CompletionsDialect
from llama_tp.serving.dialects.openai.request import Names
from llama_tp.serving.encoding import to_json
from llama_tp.serving.generation import RequestDefaults


def openai_dialects(defaults: RequestDefaults, names: Names) -> dict[str, Dialect]:
    """The dialects of the routes that generate. `names`: of the model; the first one is used in answers."""
    return {
        "v1/chat/completions": ChatDialect(defaults, names),
        "v1/completions": CompletionsDialect(defaults, names),
    }


def model_documents(names: Names, max_seq_len: int) -> dict[str, bytes]:
    """The answers of the routes that describe the model, by route."""
    model = {
        "id": names[0],
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llama-tp",
        "max_model_len": max_seq_len,  # vLLM's field
    }
    return {
        "v1/models": to_json({"object": "list", "data": [model]}) + b"\n",
        **{f"v1/models/{name}": to_json(model) + b"\n" for name in names},
    }
