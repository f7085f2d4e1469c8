"""The types of the fields that dialects and configuration share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.engine.sampling_params import KNOBS, Knob

MAX_NEW_TOKENS = 2**24
"""More than any model's context; `admission.fit_context` checks the limit of the model served."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100

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


def must_be_text(value: object) -> object:
    """BeforeValidator for a Literal: reports a non-string as the wrong type, not just as none of the choices."""
    if not isinstance(value, str):
        raise PydanticCustomError("invalid_type", "must be a string")
    return value


TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
"""JSON schema of what `token_ids` accepts."""
TEXT_OR_IDS: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {**TOKEN_IDS, "minItems": 1}]}
"""JSON schema of a prompt."""
_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOPS = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,18})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}

MaxNewTokens = Annotated[
    int,
    Field(ge=1, le=MAX_NEW_TOKENS, description="Maximum number of tokens to generate; must fit into the context."),
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
TopLogprobs = Annotated[
    int, Field(ge=0, le=20, description="How many of the most probable tokens to report for each token.")
]
NumOutputs = Annotated[int, Field(ge=1, le=16, description="Number of answers to the one prompt.")]
TimeoutS = Annotated[float, Field(gt=0, le=3600, description="Seconds after which the answer ends as far as it is.")]


def _type_of(knob: Knob) -> Any:
    """The knob's kind, within the interval that the APIs accept."""
    low, high = (int(end) if end.is_integer() else end for end in (float(knob.api.low), float(knob.api.high)))
    bounds: dict[str, Any] = {"gt" if knob.api.excludes_low else "ge": low}
    bounds["lt" if knob.api.excludes_high else "le"] = high
    return Annotated[knob.kind, Field(**bounds, description=knob.meaning)]


KNOB_TYPES: dict[str, Any] = {knob.name: _type_of(knob) for knob in KNOBS}
"""Field types of the `SamplingParams` parameters that requests and configuration can set, by name."""
