"""All dialects behind their OpenAPI document, for tests that generate bodies from it."""

from __future__ import annotations

import json
from typing import Any

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.openai.routes import model_operations
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, RequestDefaults
from llama_tp.serving.openapi import openapi_document
from llama_tp.serving.routes import all_dialects
from tests.schema_strategy import from_schema

DEFAULTS = RequestDefaults(
    mode="text_completion", max_new_tokens=100, seed=42, sampling={knob.name: knob.default for knob in KNOBS}
)
DIALECTS = all_dialects(DEFAULTS, "llama")
ROUTES = list(DIALECTS)
OPERATIONS = {**{route: one.operation for route, one in DIALECTS.items()}, **model_operations("llama")}
DOCUMENT = json.loads(json.dumps(openapi_document(OPERATIONS, "llama", "1.0")))
DEFINITIONS = DOCUMENT["components"]["schemas"]
ACROSS_FIELDS = {
    ("missing_field", "prompt"),
    ("missing_field", "dialog"),
    ("invalid_type", "prompt"),
    ("invalid_type", "dialog"),
    ("conflicting_fields", "dialog"),
    ("conflicting_fields", "mode"),
    ("conflicting_fields", "continue_final_message"),
    ("conflicting_fields", "top_logprobs"),
    ("conflicting_fields", "stream_options"),
    ("conflicting_fields", "max_tokens"),
    ("conflicting_fields", "add_generation_prompt"),
    ("unsupported_value", "add_generation_prompt"),
    ("unsupported_value", "echo"),
    ("invalid_value", "min_new_tokens"),
    ("invalid_value", "min_tokens"),
    ("model_not_found", "model"),
}
"""Refusals, by code and param, of bodies that are valid under the schema. They are in docs/openapi.md."""


def body_schema(route: str) -> dict[str, Any]:
    """The definition of a route's body."""
    content = DOCUMENT["paths"][f"/{route}"]["post"]["requestBody"]["content"]
    return DEFINITIONS[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]


BODIES = {route: from_schema(body_schema(route), DEFINITIONS) for route in ROUTES}
"""Bodies that are valid under their schema, by route."""


def outcome(route: str, body: object) -> GenerationRequest | ApiError:
    """What the route's parser makes of a body. Any other exception is a bug."""
    try:
        return DIALECTS[route].parse(body)
    except ApiError as error:
        return error


def minimal(route: str) -> dict[str, Any]:
    """The body with required fields only."""
    return (
        {"messages": [{"role": "user", "content": "Hi"}]}
        if "messages" in body_schema(route)["properties"]
        else {"prompt": "Hi"}
    )
