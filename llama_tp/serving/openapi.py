"""The OpenAPI 3.1 document of a server, generated from the models that its parsers validate with.

What it cannot express is in docs/openapi.md: rules of JSON itself, and rules across fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from llama_tp import __version__
from llama_tp.serving.operation import Operation

_DEFINITIONS = "#/components/schemas/"
_FRONTEND_ERROR = {
    "type": "object",
    "description": "An error of TorchServe itself, such as a wrong token or a full job queue.",
    "properties": {"code": {"type": "integer"}, "type": {"type": "string"}, "message": {"type": "string"}},
    "required": ["code", "type", "message"],
}
_DESCRIPTION = "A field that is null counts as omitted. A server with tokens expects TorchServe's inference token."


def openapi_document(operations: Mapping[str, Operation], model_name: str, model_version: str) -> dict[str, Any]:
    """The document. `operations`: by route below /predictions/<model>/<version>/; "" is the native one."""
    schemas = _Schemas(operations)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama-tp", "version": __version__, "description": _DESCRIPTION},
        # Relative to the host. Few tools resolve "../1.0", which would hold below any prefix of a proxy.
        "servers": [{"url": f"/predictions/{model_name}/{model_version}"}],
        "security": [{}, {"bearer": []}],
        "paths": {f"/{route}": schemas.path_item(operation) for route, operation in _with_own_ids(operations).items()},
        "components": {
            "schemas": {**schemas.definitions, "FrontendError": _FRONTEND_ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _with_own_ids(operations: Mapping[str, Operation]) -> dict[str, Operation]:
    """The operations, of which the second with an id has a 2 after it."""
    counts: Counter[str] = Counter()
    distinct = {}
    for route, operation in operations.items():
        counts[operation.id] += 1
        number = counts[operation.id]
        distinct[route] = operation if number == 1 else replace(operation, id=f"{operation.id}_{number}")
    return distinct


class _Schemas:
    """The schemas of all types that operations name, and references to them."""

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        types = [kind for one in operations.values() for kind in _types(one)]
        mode: JsonSchemaMode = "validation"
        inputs = [(kind, mode, TypeAdapter(kind)) for kind in types]
        self._references, generated = TypeAdapter.json_schemas(
            inputs, ref_template=_DEFINITIONS + "{model}", schema_generator=_Generator
        )
        self.definitions: dict[str, Any] = generated["$defs"]

    def path_item(self, operation: Operation) -> dict[str, Any]:
        described: dict[str, Any] = {"operationId": operation.id, "summary": operation.summary}
        if operation.body is not None:
            content = {"application/json": {"schema": self._reference(operation.body)}}
            described["requestBody"] = {"required": True, "content": content}
        error = self._error(operation)
        described["responses"] = {"200": self._answer(operation), "4XX": error, "5XX": error}
        return {"get" if operation.body is None else "post": described}

    def _reference(self, kind: Any) -> dict[str, Any]:
        return dict(self._references[kind, "validation"])

    def _answer(self, operation: Operation) -> dict[str, Any]:
        content: dict[str, Any] = {operation.answer_type: {"schema": self._reference(operation.answer)}}
        if operation.chunk is None:
            return {"description": "The answer.", "content": content}
        chunk = self._reference(operation.chunk)
        schema = _event(chunk) if operation.chunk_type == "text/event-stream" else chunk
        content[operation.chunk_type] = {"schema": schema}
        return {"description": "The answer. The schema of a stream is that of each line or event.", "content": content}

    def _error(self, operation: Operation) -> dict[str, Any]:
        either = {"anyOf": [self._reference(operation.error), {"$ref": f"{_DEFINITIONS}FrontendError"}]}
        return {
            "description": "The request is refused, or the server is busy or has failed.",
            "content": {"application/json": {"schema": either}},
        }


class _Generator(GenerateJsonSchema):
    """Does not repeat the name of a field as its title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event; the last one of OpenAI's streams is [DONE]."""
    encoded = {"contentMediaType": "application/json", "contentSchema": data}
    kind = {"type": "string", "anyOf": [{"const": "[DONE]"}, encoded]}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": kind}, "required": ["data"]}


def _types(operation: Operation) -> list[Any]:
    kinds = (operation.body, operation.answer, operation.chunk, operation.error)
    return [kind for kind in kinds if kind is not None]
