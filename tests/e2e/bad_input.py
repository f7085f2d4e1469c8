"""The table of bad input, once for all dialects: what each row becomes in a dialect, and what it must lead to.

A row is written with the native dialect's field names. An `Api` translates it: another dialect needs one entry in APIS.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SEQ_LEN = 4096
HI = {"role": "user", "content": "Hi"}
Body = Mapping[str, Any] | bytes


@dataclass(frozen=True)
class Api:
    """A dialect, as far as its bad input differs from that of others."""

    name: str
    route: str
    prompt: str | None = None
    """Its field for a prompt."""
    dialog: str | None = None
    """Its field for messages."""
    names: Mapping[str, str | None] = field(default_factory=dict)
    """Names of fields that differ from the native dialect's. None: there is no such field."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Further fields that every request needs."""
    has_codes: bool = True
    """Whether its errors have a code and a param. Otherwise they have a type that follows from the status."""
    generates: bool = True
    """Whether it answers with tokens of the model."""

    def message(self, body: Any, code: str, status: int, param: Callable[[str], bool] = lambda param: True) -> str:
        """The message of an error, whose body must be this dialect's, with this code and param."""
        error = body["error"]
        if self.has_codes:
            assert body.keys() == {"error"}
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == code, error
            assert error["param"] is None or param(error["param"]), error
        else:
            assert body == {"type": "error", "error": {"type": ANTHROPIC_TYPES[status], "message": error["message"]}}
        return error["message"]

    def body(self, row: Row) -> Body | None:
        """The row in this dialect; None if it has no such input."""
        if row.only and self.name not in row.only:
            return None
        if row.raw is not None:
            return row.raw
        fields = {self.names.get(name, name): value for name, value in row.fields.items()}
        inputs = self._inputs(row)
        return None if None in fields or inputs is None else {**inputs, **fields}

    def _inputs(self, row: Row) -> dict[str, Any] | None:
        for name, wanted in ((self.prompt, row.prompt), (self.dialog, row.dialog)):
            if wanted is not ABSENT:
                return None if name is None else {name: wanted, **self.required}
        if not row.has_input:
            return {}
        return {self.prompt: "Hi", **self.required} if self.prompt else {self.dialog or "": [HI], **self.required}


ABSENT = object()


@dataclass(frozen=True)
class Row:
    """An input and its outcome."""

    code: str | None
    """None: it is accepted."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Added to a valid request."""
    prompt: Any = ABSENT
    dialog: Any = ABSENT
    raw: bytes | None = None
    """The whole body."""
    has_input: bool = True
    """Whether the request has a prompt or messages."""
    status: int = 400
    only: Sequence[str] = ()
    """The dialects that it is for; empty: all that have such fields."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """By dialect: codes that differ."""

    def __str__(self) -> str:
        parts = {"prompt": self.prompt, "dialog": self.dialog, "raw": self.raw, **self.fields}
        shown = [f"{name}={value!r}"[:40] for name, value in parts.items() if value is not ABSENT and value is not None]
        return f"{self.code or 'accepted'}-{','.join(shown) or 'empty'}"[:80].encode("ascii", "replace").decode()


ANTHROPIC_TYPES = {400: "invalid_request_error", 404: "not_found_error", 415: "invalid_request_error"}
OPENAI = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "timeout_s": None, "mode": None}
_NO_LISTS = dict.fromkeys(("stop_token_ids", "logit_bias", "n", "logprobs", "min_new_tokens", "timeout_s", "mode"))
MESSAGES = {**_NO_LISTS, "max_new_tokens": "max_tokens", "stop": "stop_sequences", "top_logprobs": None}
RESPONSES = {**_NO_LISTS, "max_new_tokens": "max_output_tokens", "stop": None}
_KNOBS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PROMPT_ONLY = dict.fromkeys((*MESSAGES, *_KNOBS, "seed", "stream"))
APIS = (
    Api("native", "", prompt="prompt", dialog="dialog"),
    Api("chat", "/1.0/v1/chat/completions", dialog="messages", names=OPENAI),
    Api("completions", "/1.0/v1/completions", prompt="prompt", names={**OPENAI, "logprobs": None}),
    Api("responses", "/1.0/v1/responses", prompt="input", dialog="input", names=RESPONSES),
    Api(
        "messages",
        "/1.0/v1/messages",
        dialog="messages",
        names=MESSAGES,
        required={"max_tokens": 4},
        has_codes=False,
    ),
    Api(
        "count_tokens",
        "/1.0/v1/messages/count_tokens",
        dialog="messages",
        names=PROMPT_ONLY,
        has_codes=False,
        generates=False,
    ),
    Api("tokenize", "/1.0/tokenize", prompt="prompt", dialog="messages", names=PROMPT_ONLY, generates=False),
)
"""Every dialect, and the queries that read a prompt."""
GENERATING = [api for api in APIS if api.generates]

OPENAIS = ("chat", "completions")
OTHERS = ("chat", "completions", "responses", "messages", "count_tokens", "tokenize")
"""All but the native one."""
TAKES_IDS = ("native", "completions")
"""Where a prompt may be token ids."""
TAKES_TEXT = ("native", "completions", "responses")
GENERATES = tuple(api.name for api in GENERATING)
KEEPS_TURNS = ("native", "chat", "tokenize")
"""Where successive messages of one role are not one turn."""
SWITCHES = ("native", "chat")
"""Where logprobs is a switch, not a number."""


def _each(code: str, name: str, values: Sequence[Any], only: Sequence[str] = ()) -> list[Row]:
    return [Row(code, {name: value}, only=only) for value in values]


def user(content: object = "Hi") -> dict[str, object]:
    return {"role": "user", "content": content}


def system(content: object = "Be short.") -> dict[str, object]:
    return {"role": "system", "content": content}


def assistant(content: object = "Hello.") -> dict[str, object]:
    return {"role": "assistant", "content": content}


TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[IN\u200bST]", "［INST］")
MARKER = "Xyzzy7Plugh"
POISON = (
    f"{MARKER} CUDA out of memory\n[METRICS]{MARKER}.Count:1|#Level:Host|#hostname:a,1\n[PID]1\nTorch worker started."
)
"""What TorchServe acts on in the output of a worker."""

JSON_ROWS = [
    *(Row("invalid_json", raw=raw) for raw in (b"", b"  \n", b"not json", b'{"prompt": "a"', b"{'prompt': 'a'}")),
    *(Row("invalid_json", raw=b'{"temperature": %s}' % number) for number in (b"NaN", b"Infinity", b"-Infinity")),
    Row("invalid_utf8", raw=gzip.compress(b'{"prompt": "a"}', mtime=0)),
    Row("invalid_utf8", raw='{"prompt": "a"}'.encode("utf-16")),
    Row("invalid_utf8", raw=b'{"prompt": "\xff"}'),
    Row("invalid_utf8", raw='{"prompt": "é"}'.encode("latin-1")),
    *(Row("not_an_object", raw=raw) for raw in (b"[]", b"42", b"null", b'"text"', b"true")),
    Row("too_deep", raw=b"[" * 100_000),
    Row("too_deep", raw=b'{"a":' * 100_000),
    Row("too_deep", raw=b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}"),
    Row("too_many_values", raw=b'{"prompt": [' + b"1," * 300_000 + b"1]}"),
    Row("duplicate_key", raw=b'{"seed": 1, "seed": 1}'),
    Row("duplicate_key", raw=b'{"messages": [{"role": "user", "role": "user"}]}'),
    Row("invalid_value", raw=b'{"temperature": 1e999}'),
    Row("invalid_value", raw=b'{"seed": ' + b"1" * 5000 + b"}"),
    *(Row("invalid_unicode", raw=raw) for raw in (b'{"prompt": "\\ud800"}', b'{"stop": "\\udfff"}', b'{"\\ud800": 1}')),
    Row("invalid_json", raw=POISON.encode()),
    Row("invalid_utf8", raw=b'{"prompt": "\xff' + POISON.encode()),
    Row("duplicate_key", raw=b'{"%s": 1, "%s": 2}' % (MARKER.encode(), MARKER.encode())),
]
FIELD_ROWS = [
    Row("unknown_field", {"temprature": 0}),
    Row("unknown_field", {POISON: 1}),
    Row("unknown_field", {"x" * 10_000: 1}),
    Row("unknown_field", {"max_tokens": 5}, only=["native"]),
    Row("unknown_field", {"messages": [HI]}, only=["native", "completions", "responses"]),
    Row("unknown_field", {"prompt": "Hi"}, only=["chat", "messages", "count_tokens"]),
    Row("unknown_field", {"stop": ["a"]}, only=["responses", "tokenize", "count_tokens"]),
    Row("unknown_field", {"model": "llama"}, only=["native"]),
    Row("missing_field", has_input=False),
    Row("missing_field", {"max_new_tokens": 5}, has_input=False),
    Row("missing_field", {"mode": "text_completion"}, has_input=False),
    Row("conflicting_fields", {"dialog": [HI]}, only=["native"]),
    Row("conflicting_fields", {"mode": "chat"}, prompt="Hi"),
    Row("conflicting_fields", {"mode": "text_completion"}, dialog=[HI]),
    Row("conflicting_fields", {"top_logprobs": 5}, only=(*SWITCHES, "responses")),
    Row("conflicting_fields", {"stream_options": {"include_usage": True}}, only=OPENAIS),
    Row("model_not_found", {"model": "other"}, status=404, only=OTHERS),
    Row("model_not_found", {"model": POISON}, status=404, only=OTHERS),
    *_each("unsupported_value", "best_of", [3], OPENAIS),
    *_each("unsupported_value", "use_beam_search", [True], OPENAIS),
    *_each("invalid_value", "max_new_tokens", [0, -1, 1e9, 10**9, 2**70]),
    *_each("invalid_type", "max_new_tokens", ["5", 5.5, True, [5], POISON]),
    *_each("invalid_value", "temperature", [-1, 2.1, -0.001]),
    *_each("invalid_type", "temperature", ["hot", True, []]),
    *_each("invalid_value", "top_p", [0, 1.1, -1]),
    *_each("invalid_type", "top_p", ["1", True]),
    *_each("invalid_value", "top_k", [-2, 2**40]),
    *_each("invalid_type", "top_k", [1.5, "1", False]),
    *_each("invalid_value", "min_p", [2, -0.5]),
    *_each("invalid_type", "min_p", ["0"]),
    *_each("invalid_value", "seed", [2**64, -1]),
    *_each("invalid_type", "seed", [1.5, "1", True]),
    *_each("invalid_value", "stop", [[""], ["a", "b" * 10_000]]),
    *_each("invalid_value", "stop", ["", "a" * 10_000], ["native", *OPENAIS]),
    *_each("invalid_type", "stop", ["", "a", "a" * 10_000, POISON], ["messages"]),
    *_each("invalid_type", "stop", [[1], 1, {}, [None]]),
    *_each("too_many_stops", "stop", [["a", "b", "c", "d", "e"]]),
    *_each("invalid_type", "stream", ["true", 1]),
    *_each("invalid_type", "logprobs", [1], SWITCHES),
    *_each("invalid_value", "top_logprobs", [21], (*SWITCHES, "responses")),
    *_each("invalid_value", "n", [0, 17]),
    *_each("invalid_type", "n", [1.0]),
    *_each("invalid_value", "timeout_s", [0, 3601]),
    *_each("invalid_value", "repetition_penalty", [0, 11]),
    *_each("invalid_value", "logit_bias", [{"fox": 1}, {"1": 101}]),
    *_each("invalid_type", "logit_bias", [[1], {"1": "x"}]),
    *_each("token_out_of_range", "logit_bias", [{"1000000": 1}]),
    *_each("token_out_of_range", "stop_token_ids", [[10**6], [-1]]),
    *_each("invalid_value", "mode", ["poem", POISON]),
    *_each("invalid_type", "mode", [1]),
    Row("invalid_value", {"min_new_tokens": 6, "max_new_tokens": 5}),
    Row("context_length_exceeded", {"max_new_tokens": MAX_SEQ_LEN}),
    Row("context_length_exceeded", {"min_new_tokens": MAX_SEQ_LEN}),
    Row(
        "answer_too_large",
        {"logprobs": True, "top_logprobs": 20, "n": 16, "max_new_tokens": 4000},
        only=SWITCHES,
    ),
    Row(
        "answer_too_large",
        raw=json.dumps({"prompt": "a", "logprobs": 20, "n": 16, "max_tokens": 4000}).encode(),
        only=["completions"],
    ),
    Row(None, {"stop": POISON, "max_new_tokens": 2}, status=200, only=["native", *OPENAIS]),
    Row(None, {"stop": [POISON], "max_new_tokens": 2}, status=200),
    Row("unsupported_value", {"tools": [{"type": "web_search"}]}, only=["responses", "messages", "count_tokens"]),
    Row("invalid_type", {"tools": {}}, only=["chat", "responses", "messages", "count_tokens", "tokenize"]),
    Row("invalid_value", {"tool_choice": POISON}, only=["chat", "responses"]),
    Row("invalid_value", {"response_format": {"type": "xml"}}, only=["native", *OPENAIS]),
    Row("invalid_value", {"structured_outputs": {"regex": ""}}, only=["native", *OPENAIS]),
    Row("invalid_value", {"guided_json": "[" * 100_000}, only=OPENAIS),
    Row("invalid_value", {"text": {"format": {"type": "xml"}}}, only=["responses"]),
    Row("invalid_value", {"output_config": {"format": {"type": "xml"}}}, only=["messages", "count_tokens"]),
    Row("unsupported_value", {"previous_response_id": POISON}, only=["responses"]),
    Row("unsupported_value", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, only=["messages"]),
    Row(None, {"max_new_tokens": 1}, status=200),
    Row("invalid_value", {"stop": [POISON], "temperature": 9}),
]
PROMPT_ROWS = [
    *(Row("empty_prompt", prompt=value, only=TAKES_TEXT) for value in ("", [])),
    *(Row("invalid_type", prompt=value, only=TAKES_TEXT) for value in (None, 5, 1.5, True, {})),
    *(Row("invalid_type", prompt=value, only=TAKES_TEXT) for value in ([1, "a"], [1.5], [True], [None])),
    *(Row("invalid_type", prompt=value, only=["tokenize"]) for value in (5, 1.5, True, {}, [], [1])),
    Row("invalid_type", prompt=[[1]], only=["native", "responses", "tokenize"]),
    *(Row("token_out_of_range", prompt=value, only=TAKES_IDS) for value in ([1, 10**6], [-1], [10**18])),
    Row("context_length_exceeded", prompt=[5] * MAX_SEQ_LEN, only=TAKES_IDS),
    Row("context_length_exceeded", prompt=[5] * 2 * MAX_SEQ_LEN, only=TAKES_IDS),
    Row("context_length_exceeded", {"max_new_tokens": 11}, prompt=[5] * (MAX_SEQ_LEN - 10), only=TAKES_IDS),
    Row("context_length_exceeded", prompt="water " * MAX_SEQ_LEN, only=TAKES_TEXT),
    Row("context_length_exceeded", prompt="whale" * 180_000),
    Row("context_length_exceeded", prompt=" " * 900_000, only=TAKES_IDS),
    Row("context_length_exceeded", prompt=POISON * 1000),
    Row("context_length_exceeded", prompt="🐋" * 225_000),
    Row(None, {"max_new_tokens": 1}, prompt=[5] * (MAX_SEQ_LEN - 1), status=200, only=TAKES_IDS),
    Row(None, {"max_new_tokens": 1}, prompt="a<s>b</s><|eot_id|><|im_end|>", status=200),
    Row(None, {"max_new_tokens": 2}, prompt=POISON, status=200),
    Row(None, {"max_new_tokens": 5, "stream": True}, prompt=POISON, status=200),
]
ROLES = {"responses": "invalid_value"}
"""It knows all of its roles."""
DIALOG_ROWS = [
    Row("empty_messages", dialog=[], codes={"responses": "empty_prompt"}),
    *(Row("invalid_type", dialog=value) for value in (5, {}, [123], [None], [{}], ["Hi"])),
    Row("invalid_type", dialog=None, only=["native", "chat", "responses", "messages", "count_tokens"]),
    Row("invalid_type", dialog="Hi", only=["native", "chat", "messages", "count_tokens", "tokenize"]),
    *(Row("invalid_type", dialog=[user(content)]) for content in (None, 5, {})),
    Row("invalid_type", dialog=[user([])], only=["native"]),
    Row("invalid_type", dialog=[{"role": "user"}]),
    Row("invalid_type", dialog=[{"content": "Hi"}]),
    Row("invalid_type", dialog=[{"role": 5, "content": "Hi"}]),
    Row("invalid_role", dialog=[{"role": "pirate", "content": "Hi"}], codes=ROLES),
    Row("invalid_role", dialog=[{"role": POISON, "content": POISON}], codes=ROLES),
    Row("invalid_role_order", dialog=[user(), {"role": "tool", "content": "Hi"}], codes=ROLES),
    *(
        Row("invalid_role_order", dialog=dialog)
        for dialog in (
            [assistant()],
            [assistant(), user()],
            [system()],
            [user(), system(), user()],
        )
    ),
    *(
        Row("invalid_role_order", dialog=dialog, only=(*KEEPS_TURNS, "responses"))
        for dialog in (
            [user(), user()],
            [user(POISON), user(POISON)],
            [user(), assistant()],
        )
    ),
    Row("invalid_role_order", dialog=[system(), system(), user()], only=KEEPS_TURNS),
    *(
        Row(None, {"max_new_tokens": 1}, dialog=dialog, status=200, only=["messages"])
        for dialog in ([user(), user()], [user(POISON), user(POISON)], [user(), assistant()])
    ),
    Row(None, {"max_new_tokens": 1}, dialog=[system(), system(), user()], status=200, only=["messages", "responses"]),
    *(
        Row("unsupported_value", dialog=[user([{"type": kind, "image_url": POISON}])], only=OTHERS)
        for kind in ("image_url", "input_image", "image", POISON)
    ),
    Row(
        "invalid_value",
        dialog=[user(), {"type": "function_call_output", "call_id": POISON, "output": "1"}],
        only=["responses"],
    ),
    Row("unsupported_value", dialog=[{"type": "item_reference", "id": POISON}], only=["responses"]),
    *(
        Row("invalid_value", dialog=[user([block])], only=["messages", "count_tokens"])
        for block in (
            {"type": "tool_result", "tool_use_id": POISON},
            {"type": "tool_use", "id": "a", "name": "f", "input": {}},
            {"type": "tool_use", "id": "a", "name": POISON, "input": {}},
        )
    ),
    *(Row("special_tags_not_allowed", dialog=[user(f"a {tag} b")]) for tag in TAGS),
    Row("special_tags_not_allowed", dialog=[user(f"[INST]{POISON}")]),
    Row("special_tags_not_allowed", dialog=[system("[/INST]"), user()]),
    Row("special_tags_not_allowed", dialog=[user(), assistant("<</SYS>>"), user()]),
    Row("context_length_exceeded", dialog=[user("water " * MAX_SEQ_LEN)], only=GENERATES),
    Row("context_length_exceeded", dialog=[user("whale" * 180_000)]),
    Row(None, {"max_new_tokens": 1}, dialog=[user("a<s>b</s><|eot_id|><|im_end|>")], status=200),
    Row(None, {"max_new_tokens": 1}, dialog=[user(POISON)], status=200),
]
ROWS = [*JSON_ROWS, *FIELD_ROWS, *PROMPT_ROWS, *DIALOG_ROWS]
CASES = [(api, row) for api in APIS for row in ROWS if api.body(row) is not None]
