"""The types of the fields that dialects and configuration share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from llama_tp.engine.sampling_params import KNOBS, Knob

MAX_NEW_TOKENS = 2**24
"""More than any model's context; `admission.fit_context` checks the limit of the model served."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_ALLOWED_IDS = 4096
MAX_BAD_WORDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100

MAX_MESSAGES = 8192
"""In a dialog. Checking ten times as many would delay other streams by seconds."""

ABSENT: Any = None
"""Default of an optional field."""


def _check_range_of_float(value: object) -> object:
    """Report 1e9 as out of range, not as the wrong type: 1000000000 would be no better."""
    if isinstance(value, float) and value > MAX_NEW_TOKENS:
        raise PydanticCustomError("invalid_value", f"must be an integer of at most {MAX_NEW_TOKENS}")
    return value


def _list_of_stops(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise PydanticCustomError("too_many_stops", f"must have at most {MAX_STOPS} entries")
    return value


def token_ids(value: object) -> tuple[int, ...]:
    """AfterValidator for a list of token ids, not yet checked against the vocabulary."""
    # Not pydantic's list: it would create an error for each of a hundred thousand wrong ids.
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a list of token ids")
    for at, token in enumerate(value):
        if type(token) is not int:  # a bool is an int, too
            raise PydanticCustomError("invalid_type", "must be an integer", {"at": at})
        if token < 0:
            raise PydanticCustomError("token_out_of_range", "must not be negative", {"at": at})
    return tuple(value)


def _allowed_ids(value: object) -> frozenset[int]:
    if isinstance(value, list) and not 0 < len(value) <= MAX_ALLOWED_IDS:
        raise PydanticCustomError("invalid_value", f"must have from 1 to {MAX_ALLOWED_IDS} entries")
    return frozenset(token_ids(value))


def _few_token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > MAX_STOP_IDS:
        raise PydanticCustomError("invalid_value", f"must have at most {MAX_STOP_IDS} entries")
    return token_ids(value)


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("invalid_value", f"must have at most {MAX_BIASES} entries")
    for key, bias in value.items():
        if not re.fullmatch("0|[1-9][0-9]{0,18}", key):
            raise PydanticCustomError("invalid_value", 'must have a token id as its key, such as "42"', {"at": key})
        if type(bias) not in (int, float):
            raise PydanticCustomError("invalid_type", "must be a number", {"at": key})
        if abs(bias) > MAX_BIAS:
            raise PydanticCustomError("invalid_value", f"must be from -{MAX_BIAS} to {MAX_BIAS}", {"at": key})
    return {int(key): float(bias) for key, bias in value.items()}


@dataclass(frozen=True, slots=True)
class AtMost:
    """Annotation of a list: its maximum length, checked before its entries are."""

    entries: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), "maxItems": self.entries}

    def _check(self, value: object) -> object:
        if isinstance(value, list) and len(value) > self.entries:
            raise PydanticCustomError("invalid_value", f"must have at most {self.entries} entries")
        return value


def must_be_text(value: object) -> object:
    """BeforeValidator for a Literal: reports a non-string as the wrong type, not just as none of the choices."""
    if not isinstance(value, str):
        raise PydanticCustomError("invalid_type", "must be a string")
    return value


TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
"""JSON schema of what `token_ids` accepts."""
TEXT_OR_IDS: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {**TOKEN_IDS, "minItems": 1}]}
"""JSON schema of a prompt."""
STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
"""JSON schema of a stop string."""
_STOPS = {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MAX_STOPS}]}
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,18})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}

_MOST = "Maximum number of tokens to generate; must fit into the context."
MaxNewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS, description=_MOST), BeforeValidator(_check_range_of_float)]
MaxNewTokensOrNone = Annotated[
    int,
    Field(ge=0, le=MAX_NEW_TOKENS, description=f"{_MOST} 0 where only the prompt matters."),
    BeforeValidator(_check_range_of_float),
]
MinNewTokens = Annotated[
    int,
    Field(ge=0, le=MAX_NEW_TOKENS, description="Minimum number of tokens before the answer may end."),
    BeforeValidator(_check_range_of_float),
]
LogitBias = Annotated[
    Any,
    AfterValidator(_biases),
    Field(description='Added to the logits of these token ids, as in {"42": -100}.'),
    WithJsonSchema(_BIASES),
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="The same seed gives the same answer.")]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    BeforeValidator(_list_of_stops),
    Field(description="The answer ends before the first of these to occur."),
    WithJsonSchema(_STOPS),
]
StopTokenIds = Annotated[
    Any,
    AfterValidator(_few_token_ids),
    Field(description="Further token ids that end the answer."),
    WithJsonSchema({**TOKEN_IDS, "maxItems": MAX_STOP_IDS}),
]
AllowedTokenIds = Annotated[
    Any,
    AfterValidator(_allowed_ids),
    Field(description="Only these tokens may be in the answer."),
    WithJsonSchema({**TOKEN_IDS, "minItems": 1, "maxItems": MAX_ALLOWED_IDS}),
]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_BAD_WORDS, description="Texts whose tokens must not follow each other in the answer."),
    FailFast(),
]
TopLogprobs = Annotated[
    int, Field(ge=0, le=20, description="How many of the most probable tokens to report for each token.")
]
PromptLogprobs = Annotated[
    int,
    Field(
        ge=0,
        le=20,
        description="Report the log probabilities of the prompt's tokens, with this many of the most probable ones.",
    ),
]
FewMessages = AtMost(MAX_MESSAGES)
"""For a list of messages, or of other items of a dialog."""
NumOutputs = Annotated[int, Field(ge=1, le=16, description="Number of answers to each prompt.")]
TimeoutS = Annotated[float, Field(gt=0, le=3600, description="Seconds after which the answer ends as far as it is.")]


def _type_of(knob: Knob) -> Any:
    """The knob's kind, within the interval that the APIs accept."""
    low, high = (int(end) if end.is_integer() else end for end in (float(knob.api.low), float(knob.api.high)))
    bounds: dict[str, Any] = {"gt" if knob.api.excludes_low else "ge": low}
    bounds["lt" if knob.api.excludes_high else "le"] = high
    return Annotated[knob.kind, Field(**bounds, description=knob.meaning)]


KNOB_TYPES: dict[str, Any] = {knob.name: _type_of(knob) for knob in KNOBS}
"""Field types of the `SamplingParams` parameters that requests and configuration can set, by name."""
