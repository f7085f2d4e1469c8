"""What the requests of OpenAI's completion routes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.serving.dialects.openai.unsupported import EVERYWHERE, IGNORED, only
from llama_tp.serving.encoding import shown
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import (
    ABSENT,
    KNOB_TYPES,
    LogitBias,
    MaxNewTokens,
    MinNewTokens,
    NumOutputs,
    Seed,
    StopStrings,
    StopTokenIds,
)
from llama_tp.serving.generation import FieldNames, GenerationRequest, ReplyOptions, RequestDefaults
from llama_tp.serving.strict_json import parse_json
from llama_tp.serving.strict_model import StrictModel, validate

Given = Mapping[str, Any]
"""The fields that a request sets, by name."""


class StreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    """Send the usage in an event before the last."""
    include_obfuscation: IGNORED = False
    continuous_usage_stats: only(False) = False  # type: ignore[valid-type]


def _all_if_minus_one(value: object) -> object:
    """-1 is vLLM's other way to say that all tokens may be sampled."""
    return 0 if value == -1 and type(value) is int else value


class _Shared(StrictModel):
    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    min_tokens: MinNewTokens = 0
    max_tokens: MaxNewTokens = ABSENT
    logit_bias: LogitBias = ABSENT
    seed: Seed = ABSENT
    stop: StopStrings = ABSENT
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    """Whether the model's own end tokens do not end the answer."""
    n: NumOutputs = 1
    stream: bool = False
    """Server-sent events, instead of a single object."""
    stream_options: StreamOptions = ABSENT
    """Needs stream."""
    return_token_ids: bool = False
    """Report the token ids of prompt and answer."""


_KNOBS = {name: (kind, ABSENT) for name, kind in KNOB_TYPES.items()}
_top_k = {
    "type": "integer",
    "minimum": -1,
    "maximum": int(next(knob for knob in KNOBS if knob.name == "top_k").api.high),
}
_TopK: Any = Annotated[KNOB_TYPES["top_k"], BeforeValidator(_all_if_minus_one), WithJsonSchema(_top_k)]  # noqa: F821
_UNSUPPORTED = {name: (kind, ABSENT) for name, kind in EVERYWHERE.items()}
_fields: dict[str, Any] = {**_KNOBS, "top_k": (_TopK, ABSENT), **_UNSUPPORTED}
SharedFields = create_model("SharedFields", __base__=_Shared, **_fields)

Fields = TypeVar("Fields", bound=StrictModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a completion route needs to know of the server."""

    model_name: str
    max_tokens: int
    """Default."""
    seed: int | None
    sampling: Mapping[str, float]
    """Defaults of the KNOBS of `SamplingParams`."""

    @classmethod
    def of(cls, defaults: RequestDefaults, model_name: str, *, max_tokens: int) -> Route:
        """As in vLLM, what the configuration sets is the default; otherwise it is OpenAI's: plain sampling, and
        `max_tokens`."""
        sampling = {
            knob.name: defaults.sampling[knob.name] if knob.name in defaults.configured else knob.default
            for knob in KNOBS
        }
        if "max_new_tokens" in defaults.configured:
            max_tokens = defaults.max_new_tokens
        return cls(model_name=model_name, max_tokens=max_tokens, seed=defaults.seed, sampling=sampling)

    def validate(self, model: type[Fields], body: object) -> Fields:
        """The fields of a body. ApiError with status 404 if it is for another model, else 400 if it is invalid."""
        payload = parse_json(body)
        fields = validate(model, payload)
        name = payload.get("model")
        if name not in (None, self.model_name):
            message = f"model={shown(name)} does not exist; this server has {shown(self.model_name)}"
            raise ApiError(404, "model_not_found", message, "model")
        return fields

    def request(
        self, given: Given, names: FieldNames, *, logprobs: int | None, echo: bool = False, **prompt: Any
    ) -> GenerationRequest:
        """The request that the fields of a route describe. `prompt`: the fields of GenerationRequest that hold it."""
        _check_pairs(given, names)
        options = given.get("stream_options")
        return GenerationRequest(
            **prompt,
            sampling=self._sampling(given, names, logprobs),
            max_new_tokens_explicit=names.max_new_tokens in given,
            stop=tuple(given.get("stop", ())),
            stop_token_ids=given.get("stop_token_ids", ()),
            ignore_eos=given.get("ignore_eos", False),
            stream=given.get("stream", False),
            reply=ReplyOptions(
                echo=echo,
                usage_in_stream=options is not None and options.include_usage,
                token_ids=given.get("return_token_ids", False),
            ),
            names=names,
        )

    def _sampling(self, given: Given, names: FieldNames, logprobs: int | None) -> SamplingParams:
        least = given.get("min_tokens", 0)
        most = given.get(names.max_new_tokens)
        if most is None:
            most = max(self.max_tokens, least)
        return SamplingParams(
            max_new_tokens=most,
            min_new_tokens=least,
            **{name: given.get(name, default) for name, default in self.sampling.items()},
            logit_bias=given.get("logit_bias", {}),
            seed=given.get("seed", self.seed),
            n=given.get("n", 1),
            logprobs=logprobs,
        )


def given_in(fields: StrictModel) -> dict[str, Any]:
    return {name: getattr(fields, name) for name in fields.model_fields_set}


def text_or_refusal(part: object) -> str:
    """The text of a part of a content. PydanticCustomError for any other part."""
    if not isinstance(part, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise PydanticCustomError("unsupported_value", "is not a part of type text, the only one that is supported")
    if not isinstance(text, str):
        raise PydanticCustomError("invalid_type", "must have a string as its text")
    return text


def _check_pairs(given: Given, names: FieldNames) -> None:
    """ApiError where two fields contradict each other."""
    least, most = given.get("min_tokens", 0), given.get(names.max_new_tokens)
    if most is not None and least > most:
        message = f"min_tokens={least} must be at most {names.max_new_tokens}={most}"
        raise ApiError(400, "invalid_value", message, "min_tokens")
    if "stream_options" in given and not given.get("stream"):
        message = "stream_options needs stream=true, which is not given"
        raise ApiError(400, "conflicting_fields", message, "stream_options")
