"""All dialects and queries behind their OpenAPI document, for tests that generate bodies from it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, RequestDefaults
from llama_tp.serving.routes import OPENAPI, Routes
from llama_tp.text.tokenizer import Tokenizer
from tests.schema_strategy import from_schema
from tests.unit.text_fixtures import tiny

MAX_SEQ_LEN = 2048
DEFAULTS = RequestDefaults(
    mode="text_completion", max_new_tokens=100, seed=42, sampling={knob.name: knob.default for knob in KNOBS}
)
SERVED = Routes.of(DEFAULTS, ("llama",), max_seq_len=MAX_SEQ_LEN)
DIALECTS, QUERIES = SERVED.dialects, SERVED.queries
ALIASES = {f"v1/{route}": route for route in QUERIES if f"v1/{route}" in QUERIES}
"""Routes that are other names of one."""
ROUTES = [route for route in (*DIALECTS, *QUERIES) if route not in ALIASES]
"""All routes that take a body."""
DOCUMENT = json.loads(SERVED.documents[OPENAPI].body)
DEFINITIONS = DOCUMENT["components"]["schemas"]


@dataclass(frozen=True)
class Rule:
    """A refusal of bodies that are valid under the schema. It is in docs/openapi.md."""

    code: str
    param: str
    """Without numbers."""
    words: str
    """In the message, unlike in that of a value that is not valid under the schema."""

    def is_broken(self, error: ApiError) -> bool:
        same = (self.code, self.param) == (error.code, re.sub(r"\[\d+\]", "[]", error.param or ""))
        return same and self.words in error.message


_CONTRADICTS = "contradict each other"
_BOTH = "both prescribe the answer's form"
_FORMS = (
    "structured_outputs",
    *(f"guided_{name}" for name in ("json", "regex", "choice", "grammar")),
    "json_schema",
    "grammar",
)
ACROSS_FIELDS = (
    # the native route
    *(Rule("missing_field", name, "is missing; send a prompt, or a dialog") for name in ("prompt", "dialog")),
    *(Rule("invalid_type", name, "must not be null; send a prompt, or a dialog") for name in ("prompt", "dialog")),
    Rule("conflicting_fields", "dialog", "are both given"),
    Rule("conflicting_fields", "mode", "contradicts"),
    Rule("conflicting_fields", "continue_final_message", "needs a dialog"),
    Rule("invalid_value", "min_new_tokens", "must be at most max_new_tokens"),
    Rule("invalid_value", "max_new_tokens", "or needs prompt_logprobs"),
    # it, and OpenAI's completion routes
    Rule("conflicting_fields", "top_logprobs", "needs logprobs=true"),
    Rule("conflicting_fields", "prompt_logprobs", "not possible in a stream"),
    *(Rule("conflicting_fields", name, _CONTRADICTS) for name in ("min_tokens", "min_new_tokens", "ignore_eos")),
    *(Rule("conflicting_fields", name, _BOTH) for name in _FORMS),
    Rule("conflicting_fields", "structured_outputs", "must have only one of"),
    *(
        Rule("invalid_value", name, "must be a JSON schema, or its text")
        for name in ("guided_json", "structured_outputs.json", "json_schema")
    ),
    # OpenAI's completion routes
    Rule("conflicting_fields", "stream_options", "needs stream=true"),
    Rule("conflicting_fields", "max_tokens", "contradicts max_completion_tokens"),
    Rule("invalid_value", "min_tokens", "must be at most max"),
    *(
        Rule("invalid_value", name, "or needs echo=true or prompt_logprobs")
        for name in ("max_tokens", "max_completion_tokens")
    ),
    Rule("invalid_type", "messages[].content", "content=null must be"),
    Rule("invalid_value", "messages[].tool_calls", "belong to messages of the assistant"),
    Rule("invalid_value", "messages[].tool_calls[].function.arguments", "must be the JSON text of an object"),
    # chats
    Rule("conflicting_fields", "add_generation_prompt", "contradicts add_generation_prompt"),
    # all but the native route
    Rule("model_not_found", "model", "does not exist"),
    Rule("invalid_value", "tools[]", "has the name of another tool"),
    Rule("conflicting_fields", "tool_choice", "the request has no tools"),
    Rule("invalid_value", "tool_choice", "is not one of the tools"),
    # v1/responses
    Rule("conflicting_fields", "top_logprobs", "needs message.output_text.logprobs in include"),
    Rule("invalid_value", "input[].arguments", "must be the JSON text of an object"),
    Rule("invalid_value", "input[].call_id", "is not the id of an earlier call"),
    # Anthropic's
    Rule("invalid_value", "tool_choice", "must have a name with the type tool"),
    Rule("conflicting_fields", "output_format", "contradicts output_config.format"),
    Rule("invalid_role", "messages[].content[]", "which only the"),
    Rule("invalid_role_order", "messages[]", "ends with a tool_use"),
    Rule("invalid_value", "messages[].content[].tool_use_id", "is not the id of an earlier call"),
    # tokenize
    Rule("missing_field", "prompt", "is missing; send a prompt or messages"),
    Rule("conflicting_fields", "prompt", "prompt and messages are both given"),
    Rule("unsupported_value", "add_special_tokens", "with prompt only"),
    *(
        Rule("conflicting_fields", name, "needs messages")
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    ),
)


def is_across(error: ApiError) -> bool:
    """Whether a body is refused by a rule that the schema cannot express."""
    return any(rule.is_broken(error) for rule in ACROSS_FIELDS)


def body_schema(route: str) -> dict[str, Any]:
    """The definition of a route's body."""
    content = DOCUMENT["paths"][f"/{route}"]["post"]["requestBody"]["content"]
    return DEFINITIONS[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]


BODIES = {route: from_schema(body_schema(route), DEFINITIONS) for route in ROUTES}
"""Bodies that are valid under their schema, by route."""


class _Prompts:
    """As much of `Admission` as queries use. Every prompt has the same tokens."""

    tokenizer: Tokenizer = tiny("sentencepiece")
    max_seq_len = MAX_SEQ_LEN

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        return [5, 6, 7]


def outcome(route: str, body: object) -> GenerationRequest | bytes | ApiError:
    """What the route makes of a body: a request, or a query's answer. Any other exception is a bug."""
    try:
        return DIALECTS[route].parse(body) if route in DIALECTS else QUERIES[route].answer(body, _Prompts())
    except ApiError as error:
        return error


_MINIMAL: Sequence[tuple[str, Any]] = (
    ("input", "Hi"),
    ("tokens", [5]),
    ("max_tokens", 5),
    ("messages", [{"role": "user", "content": "Hi"}]),
)


def minimal(route: str) -> dict[str, Any]:
    """The body with required fields only."""
    required = body_schema(route).get("required", ())
    return {name: value for name, value in _MINIMAL if name in required} or {"prompt": "Hi"}
