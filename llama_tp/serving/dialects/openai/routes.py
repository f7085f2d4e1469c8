"""The routes of OpenAI's API, below /predictions/<model>/<version>/."""

from __future__ import annotations

import time

from llama_tp.serving.dialects.base import Dialect, Query
from llama_tp.serving.dialects.openai.chat import ChatDialect
from llama_tp.serving.dialects.openai.completions import CompletionsDialect
from llama_tp.serving.dialects.openai.responses.dialect import ResponsesDialect
from llama_tp.serving.dialects.openai.tokenize import DetokenizeQuery, TokenizeQuery
from llama_tp.serving.dialects.openai.types import Model, ModelList
from llama_tp.serving.dialects.route import ModelRoute, Names
from llama_tp.serving.document import Document
from llama_tp.serving.encoding import to_json
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.operation import Operation


def openai_dialects(defaults: RequestDefaults, names: Names) -> dict[str, Dialect]:
    """The dialects of the routes that generate. `names`: of the model; the first one is used in answers."""
    return {
        "v1/chat/completions": ChatDialect(defaults, names),
        "v1/completions": CompletionsDialect(defaults, names),
        "v1/responses": ResponsesDialect(defaults, names),
    }


def openai_queries(defaults: RequestDefaults, names: Names) -> dict[str, Query]:
    """The routes that answer without the engine. vLLM has them beside v1/, clients of v1/ look below it."""
    route = ModelRoute.of(defaults, names, max_tokens=MAX_NEW_TOKENS)
    queries: dict[str, Query] = {"tokenize": TokenizeQuery(route), "detokenize": DetokenizeQuery(route)}
    return queries | {f"v1/{name}": query for name, query in queries.items()}


def model_documents(names: Names, max_seq_len: int) -> dict[str, Document]:
    """The answers of the routes that describe the model, by route."""
    model = {
        "id": names[0],
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llama-tp",
        "max_model_len": max_seq_len,  # vLLM's field
    }
    return {
        "v1/models": Document(to_json({"object": "list", "data": [model]}) + b"\n", _LIST),
        **{f"v1/models/{name}": Document(to_json(model) + b"\n", _RETRIEVE) for name in names},
    }


_LIST = Operation(id="list_models", summary="The model that is served.", answer=ModelList)
_RETRIEVE = Operation(id="retrieve_model", summary="The model that is served, and its context length.", answer=Model)
