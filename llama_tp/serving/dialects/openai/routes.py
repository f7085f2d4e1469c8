"""The routes of OpenAI's API, below /predictions/<model>/<version>/."""

from __future__ import annotations

import time

from llama_tp.serving.dialects.base import Dialect
from llama_tp.serving.dialects.openai.chat import ChatDialect
from llama_tp.serving.dialects.openai.completions import CompletionsDialect
from llama_tp.serving.dialects.openai.types import Model, ModelList
from llama_tp.serving.encoding import to_json
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.operation import Operation


def openai_dialects(defaults: RequestDefaults, model_name: str) -> dict[str, Dialect]:
    """The dialects of the routes that generate."""
    return {
        "v1/chat/completions": ChatDialect(defaults, model_name),
        "v1/completions": CompletionsDialect(defaults, model_name),
    }


def model_documents(model_name: str, max_seq_len: int) -> dict[str, bytes]:
    """The answers of the routes that describe the model, by route."""
    model = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llama-tp",
        "max_model_len": max_seq_len,  # vLLM's field
    }
    return {
        "v1/models": to_json({"object": "list", "data": [model]}) + b"\n",
        f"v1/models/{model_name}": to_json(model) + b"\n",
    }


def model_operations(model_name: str) -> dict[str, Operation]:
    """The routes of `model_documents`, for the OpenAPI document."""
    return {
        "v1/models": Operation(id="list_models", summary="The model that is served.", answer=ModelList),
        f"v1/models/{model_name}": Operation(
            id="retrieve_model", summary="The model that is served, with its context length.", answer=Model
        ),
    }
