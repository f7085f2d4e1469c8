"""The routes of OpenAI's API, below /predictions/<model>/<version>/."""

from __future__ import annotations

import time

from llama_tp.serving.dialects.base import Dialect, Query
from llama_tp.serving.dialects.openai.chat import ChatDialect
from llama_tp.serving.dialects.openai.completions import CompletionsDialect
from llama_tp.serving.dialects.openai.responses.dialect import ResponsesDialect
from llama_tp.serving.dialects.openai.tokenize import DetokenizeQuery, TokenizeQuery
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.document import Document
from llama_tp.serving.encoding import to_json
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import RequestDefaults


def openai_dialects(defaults: RequestDefaults, model_name: str) -> dict[str, Dialect]:
    """The dialects of the routes that generate."""
    return {
        "v1/chat/completions": ChatDialect(defaults, model_name),
        "v1/completions": CompletionsDialect(defaults, model_name),
        "v1/responses": ResponsesDialect(defaults, model_name),
    }


def openai_queries(defaults: RequestDefaults, model_name: str) -> dict[str, Query]:
    """The routes that answer without the engine. vLLM has them beside v1/, clients of v1/ look below it."""
    route = ModelRoute.of(defaults, model_name, max_tokens=MAX_NEW_TOKENS)
    queries: dict[str, Query] = {"tokenize": TokenizeQuery(route), "detokenize": DetokenizeQuery(route)}
    return queries | {f"v1/{name}": query for name, query in queries.items()}


def model_documents(model_name: str, max_seq_len: int) -> dict[str, Document]:
    """The answers of the routes that describe the model, by route."""
    model = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llama-tp",
        "max_model_len": max_seq_len,  # vLLM's field
    }
    return {
        "v1/models": Document(to_json({"object": "list", "data": [model]}) + b"\n"),
        f"v1/models/{model_name}": Document(to_json(model) + b"\n"),
    }
