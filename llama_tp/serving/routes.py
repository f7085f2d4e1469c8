"""All routes below /predictions/<model>/<version>/. The model's own route is the empty one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_tp.serving.dialects.anthropic.routes import anthropic_dialects, anthropic_queries
from llama_tp.serving.dialects.base import Dialect, Query
from llama_tp.serving.dialects.native import NativeDialect
from llama_tp.serving.dialects.openai.routes import model_documents, openai_dialects, openai_queries
from llama_tp.serving.dialects.route import Names
from llama_tp.serving.document import Document
from llama_tp.serving.encoding import to_json
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.openapi import openapi_document
from llama_tp.serving.operation import Operation
from llama_tp.serving.page.assembly import chat_page

OPENAPI = "openapi.json"
_OPENAPI = Operation(id="openapi", summary="This document.", answer=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Routes:
    """What answers requests, by route."""

    dialects: Mapping[str, Dialect]
    queries: Mapping[str, Query]
    documents: Mapping[str, Document]

    @classmethod
    def of(cls, defaults: RequestDefaults, names: Names, *, max_seq_len: int, model_version: str = "1.0") -> Routes:
        """The routes of a model. `names`: the first one is used in answers, the last one in URLs."""
        dialects = {
            "": NativeDialect(defaults),
            **openai_dialects(defaults, names),
            **anthropic_dialects(defaults, names),
        }
        queries = {**openai_queries(defaults, names), **anthropic_queries(defaults, names)}
        documents = {**model_documents(names, max_seq_len), "chat": chat_page()}
        answering: Mapping[str, Dialect | Query | Document] = {**dialects, **queries, **documents}
        operations = {**{route: one.operation for route, one in answering.items()}, OPENAPI: _OPENAPI}
        described = openapi_document(operations, names[-1], model_version)
        return cls(dialects, queries, {**documents, OPENAPI: Document(to_json(described) + b"\n", _OPENAPI)})

    def __iter__(self) -> Iterator[str]:
        yield from (*self.dialects, *self.queries, *self.documents)
