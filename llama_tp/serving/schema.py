"""Strict JSON and the limits that both API dialects share. Text in, text out: no tokenizer, no model, no TorchServe.

A body becomes a request in two steps. `parse_json` takes what JSON itself leaves open (depth, duplicate keys, numbers
without a float64, lone surrogates); `validate` holds the object against a `StrictModel`. Whatever is wrong with either
is one `ApiError`. A UTF-8 byte order mark is ignored, as RFC 8259 section 8.1 allows: Windows editors write one.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

MAX_DEPTH = 32
"""Levels of objects and lists in a body; the body itself is the first."""
MAX_VALUES = 1 << 18
"""Values in a body: twice the token ids of the longest context, and few enough that other streams notice nothing."""
MAX_ECHO = 64
"""Characters of the user's text that an error repeats."""
MAX_MESSAGE = 1000
"""Characters of an error's message."""
MAX_NEW_TOKENS = 2**24
"""More than any model's context; what a given model can do is judged by `native.check_context`."""
MAX_TOP_K = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100

ABSENT: Any = None
"""Default of a model's field that may be left out."""

Path = tuple[str | int, ...]
"""Keys and indices that lead from the body to a value."""


class ApiError(Exception):
    """A request that is answered with `status` and `body()` instead of tokens.

    str() is status and code only: the message and param repeat text of the user's, which no log may hold.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = cut(message, MAX_MESSAGE)
        self.param = param

    def fields(self) -> dict[str, str | None]:
        """What the error is, as a value for JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """The error as OpenAI's clients read it: one line of JSON in UTF-8."""
        return to_json({"error": self.fields()})


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_encode_in_pieces = json.JSONEncoder(ensure_ascii=False).iterencode


def to_json(value: Any) -> bytes:
    """One line of compact JSON, always valid UTF-8: a lone surrogate becomes a question mark."""
    return _encode(value).encode("utf-8", "replace")


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of the text, the last three of them dots where something is missing."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object) -> str:
    """A value as an error message repeats it: as JSON, printable, on one line, at most MAX_ECHO characters."""
    try:
        text = _beginning_of_json(value[: MAX_ECHO + 1] if isinstance(value, str) else value)
    except (TypeError, ValueError):  # YAML has values that JSON lacks, such as dates
        text = repr(value)
    escaped = (char if char.isprintable() else json.dumps(char)[1:-1] for char in text[: MAX_ECHO + 1])
    return cut("".join(escaped), MAX_ECHO)


def _beginning_of_json(value: object) -> str:
    """The value's JSON, or more than MAX_ECHO characters of it: a long list is not encoded to its end."""
    text = ""
    for piece in _encode_in_pieces(value):
        text += piece
        if len(text) > MAX_ECHO:
            break
    return text


def in_json_words(expected: str) -> str:
    """The choices of a Literal, which pydantic lists as Python writes them, as JSON writes them."""
    words = {"True": "true", "False": "false", "None": "null"}
    return re.sub("True|False|None|'([^']*)'", lambda match: words.get(match[0], f'"{match[1]}"'), expected)


def param_of(path: Path) -> str:
    """A path as users write it: dialog[1].role"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{cut(part, MAX_ECHO)}" for part in path)
    return cut("".join(parts).removeprefix("."), MAX_ECHO)


def parse_json(body: object) -> dict[str, Any]:
    """The JSON object in a body of bytes or text; an already parsed body passes the checks that are still possible.

    Afterwards no string holds a lone surrogate, no number lies outside float64, and nothing is deeper than MAX_DEPTH.
    """
    if isinstance(body, (str, bytes, bytearray, memoryview)):
        body = _loads(body)
    if not isinstance(body, Mapping):
        raise ApiError(
            400, "not_an_object", f'the body is {shown(body)}; it must be an object such as {{"prompt": "Hi"}}'
        )
    parsed = dict(body)
    _check_values(parsed, ())
    return parsed


def _loads(body: str | bytes | bytearray | memoryview) -> Any:
    """json.loads, without what it tolerates. Depth is judged before parsing, so that no input can exhaust the stack."""
    text, raw = _decode(body)
    if not text.strip():
        raise ApiError(400, "invalid_json", 'the body is empty; send a JSON object such as {"prompt": "Hi"}')
    outside = _outside_strings(raw)
    if _depth(outside) > MAX_DEPTH:
        raise _too_deep()
    if (commas := outside.count(b",")) >= MAX_VALUES:
        raise ApiError(400, "too_many_values", f"the body holds over {commas} values; send at most {MAX_VALUES}")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise ApiError(400, "invalid_json", message) from None
    except ValueError:  # CPython refuses to convert integers of more than 4300 digits
        raise ApiError(
            400, "invalid_value", "an integer has thousands of digits; no field takes such a number"
        ) from None


def _decode(body: str | bytes | bytearray | memoryview) -> tuple[str, bytes]:
    """The body as text, without byte order mark, and as the same text's UTF-8."""
    try:
        raw = body.encode() if isinstance(body, str) else bytes(body)
        text = raw.decode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "invalid_unicode", "the body holds half of a surrogate pair; send whole characters"
        ) from None
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 (byte {error.start}); send uncompressed JSON in UTF-8"
        raise ApiError(400, "invalid_utf8", message) from None
    return text.removeprefix("\ufeff"), raw


_BRACKETS = b"[]{}"
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def _outside_strings(raw: bytes) -> bytes:
    """The body without its strings, in linear time. Right up to the first error of a text that is not JSON."""
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    """Deepest nesting."""
    steps = outside.translate(_STEPS, delete=_NOT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ApiError(400, "duplicate_key", f"the key {shown(twice)} occurs twice in one object", param_of((twice,)))
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, "invalid_json", f"the body is not JSON: there is no {name} in JSON")


def _too_deep() -> ApiError:
    return ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_values(value: object, path: Path) -> None:
    """ApiError for what a valid JSON text may hold, but no request may."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _out_of_float64(path)
    elif isinstance(value, int):
        if value.bit_length() > 1023:
            raise _out_of_float64(path)
    elif isinstance(value, (dict, list)):
        if len(path) >= MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            for key in value:
                _check_key(key, path)
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(item, (*path, part))


def _check_key(key: object, path: Path) -> None:
    if not isinstance(key, str):
        raise ApiError(400, "invalid_type", f"the key {shown(key)} must be a string", param_of(path) or None)
    _check_text(key, (*path, key))


def _check_text(text: str, path: Path) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        message = f"{param_of(path)} holds half of a surrogate pair, {half}; send whole characters"
        raise ApiError(400, "invalid_unicode", message, param_of(path)) from None


def _out_of_float64(path: Path) -> ApiError:
    return ApiError(400, "invalid_value", f"{param_of(path)} must be a finite number within float64", param_of(path))


class StrictModel(BaseModel):
    """An object with known fields of exactly the declared JSON types: no conversion, no extras.

    null for a field that may be left out means that it is left out, as clients mean it that send every field they know.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    hints: ClassVar[Mapping[str, str]] = {}
    """What to do instead, for names that other APIs give their fields."""

    @model_validator(mode="before")
    @classmethod
    def _know_every_field(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        # Not pydantic's extra="forbid": that makes an error of each of a million keys, and suggests nothing.
        for key in value:
            if key not in cls.model_fields:
                hint = cls.hints.get(key) or _nearest(key, cls.model_fields)
                raise PydanticCustomError("unknown_field", "is not a known field; {hint}", {"at": key, "hint": hint})
        return {key: item for key, item in value.items() if item is not None or cls.model_fields[key].is_required()}


def _nearest(key: str, fields: Collection[str]) -> str:
    close = difflib.get_close_matches(key[:MAX_ECHO], fields, n=1)
    return f"did you mean {close[0]}?" if close else f"the fields are {', '.join(fields)}"


Model = TypeVar("Model", bound=StrictModel)


def validate(model: type[Model], payload: Mapping[str, Any]) -> Model:
    """The payload as `model`, or the first thing wrong with it as an ApiError.

    A list of models or numbers should carry FailFast(): one error is enough.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise _api_error(first, payload)


# Every kind of error that pydantic finds in our models: its code, and the constraint as the message says it. A
# PydanticCustomError is not listed: its type is the code, its message the constraint, and its context may hold as "at"
# the key or index that it is about.
_RULES = {
    "missing": ("missing_field", "is missing"),
    "model_type": ("invalid_type", "must be an object"),
    "dict_type": ("invalid_type", "must be an object"),
    "list_type": ("invalid_type", "must be a list"),
    "string_type": ("invalid_type", "must be a string"),
    "bool_type": ("invalid_type", "must be true or false"),
    "int_type": ("invalid_type", "must be an integer"),
    "float_type": ("invalid_type", "must be a number"),
    "literal_error": ("invalid_value", "must be {expected}"),
    "greater_than": ("invalid_value", "must be greater than {gt}"),
    "greater_than_equal": ("invalid_value", "must be at least {ge}"),
    "less_than": ("invalid_value", "must be less than {lt}"),
    "less_than_equal": ("invalid_value", "must be at most {le}"),
    "string_too_short": ("invalid_value", "must have at least {min_length} characters"),
    "string_too_long": ("invalid_value", "must have at most {max_length} characters"),
    "too_short": ("invalid_value", "must have at least {min_length} entries"),
    "too_long": ("invalid_value", "must have at most {max_length} entries"),
}


def _api_error(error: ErrorDetails, payload: object) -> ApiError:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    path = _path_in(payload, error["loc"])
    if "at" in context:
        path, value = (*path, context["at"]), value[context["at"]]
    code, constraint = _RULES.get(kind, (kind, error["msg"]))
    if kind == "missing":  # a field of the request is asked for; one of an object inside makes that object malformed
        code = code if len(path) == 1 else "invalid_type"
        given = param_of(path)
    else:
        given = f"{param_of(path)}={shown(value)}"
    if kind == "literal_error":
        context = {"expected": in_json_words(context["expected"])}
    constraint = constraint.format(**context) if kind in _RULES else constraint
    return ApiError(400, code, f"{given} {constraint}", param_of(path))


def _path_in(payload: object, location: tuple[int | str, ...]) -> Path:
    """A pydantic location without the steps that are not in the payload: tags of unions, index of a lone string."""
    path: list[str | int] = []
    for part in location:
        if isinstance(payload, dict) and isinstance(part, str):
            payload = payload.get(part)
        elif isinstance(payload, list) and isinstance(part, int):
            payload = payload[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _judge_a_huge_float_by_its_value(value: object) -> object:
    """1e9 is out of range before it is of the wrong type: so the user learns what is wrong with 1000000000, too."""
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
    """AfterValidator for a list of token ids, of which only the upper bound is left to check."""
    # Not a list of pydantic's: that makes an error of each of a hundred thousand wrong ids.
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a list of token ids")
    for at, token in enumerate(value):
        if type(token) is not int:  # a bool is an int, too
            raise PydanticCustomError("invalid_type", "must be an integer", {"at": at})
        if token < 0:
            raise PydanticCustomError("token_out_of_range", "is negative, which no token id is", {"at": at})
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
    """BeforeValidator for a Literal: a value of another type is of the wrong type, not just none of the choices."""
    if not isinstance(value, str):
        raise PydanticCustomError("invalid_type", "must be a string")
    return value


MaxNewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), BeforeValidator(_judge_a_huge_float_by_its_value)]
MinNewTokens = Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS), BeforeValidator(_judge_a_huge_float_by_its_value)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOP_K)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=10)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[Any, AfterValidator(_biases)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], BeforeValidator(_list_of_stops)
]
StopTokenIds = Annotated[Any, AfterValidator(_few_token_ids)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
NumOutputs = Annotated[int, Field(ge=1, le=16)]
TimeoutS = Annotated[float, Field(gt=0, le=3600)]
