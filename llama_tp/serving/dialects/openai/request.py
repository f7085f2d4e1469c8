"""What the requests of OpenAI's completion routes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.serving.dialects.openai.unsupported import EVERYWHERE
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.dialects.structure import FIELDS, grammar_in
from llama_tp.serving.dialects.unsupported import IGNORED
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import (
    ABSENT,
    KNOB_TYPES,
    MAX_NEW_TOKENS,
    AllowedTokenIds,
    BadWords,
    LogitBias,
    MaxNewTokensOrNone,
    MinNewTokens,
    NumOutputs,
    PromptLogprobs,
    Seed,
    StopStrings,
    StopTokenIds,
)
from llama_tp.serving.generation import FieldNames, GenerationRequest, ReplyOptions
from llama_tp.serving.strict_model import StrictModel

Given = Mapping[str, Any]
"""The fields that a request sets, by name."""


class StreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    """Send the usage in an event before the last."""
    include_obfuscation: IGNORED = False
    continuous_usage_stats: bool = False
    """Send the usage so far in every event."""


def _all_if_minus_one(value: object) -> object:
    """-1 is vLLM's other way to say that all tokens may be sampled."""
    return 0 if value == -1 and type(value) is int else value


class _Shared(StrictModel):
    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    min_tokens: MinNewTokens = 0
    max_tokens: MaxNewTokensOrNone = ABSENT
    logit_bias: LogitBias = ABSENT
    seed: Seed = ABSENT
    stop: StopStrings = ABSENT
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    """Whether the model's own end tokens do not end the answer."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string, or the stop token's text, rather than before it."""
    skip_special_tokens: bool = True
    """Whether the text is without the pieces of special tokens."""
    allowed_token_ids: AllowedTokenIds = ABSENT
    bad_words: BadWords = ABSENT
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = ABSENT
    """Keep only this many of the prompt's tokens, the last ones."""
    prompt_logprobs: PromptLogprobs = ABSENT
    """Not in a stream."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in log probabilities as "token_id:42"."""
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
_STRUCTURE = {name: (kind, ABSENT) for name, kind in FIELDS.items()}
_fields: dict[str, Any] = {**_KNOBS, "top_k": (_TopK, ABSENT), **_STRUCTURE, **_UNSUPPORTED}
SharedFields = create_model("SharedFields", __base__=_Shared, **_fields)


class Route(ModelRoute):
    """What a completion route needs to know of the server."""

    def request(
        self, given: Given, names: FieldNames, *, logprobs: int | None, echo: bool = False, **prompt: Any
    ) -> GenerationRequest:
        """The request that the fields of a route describe. `prompt`: the fields of GenerationRequest that hold it."""
        _check_pairs(given, names, echo)
        options = given.get("stream_options")
        grammar, grammar_name = grammar_in(given, min_tokens=names.min_new_tokens)
        return GenerationRequest(
            **prompt,
            grammar=grammar,
            truncate_prompt_tokens=given.get("truncate_prompt_tokens"),
            sampling=self._sampling(given, names, logprobs, echo),
            max_new_tokens_explicit=names.max_new_tokens in given,
            stop=tuple(given.get("stop", ())),
            keep_stop=given.get("include_stop_str_in_output", False),
            special_text=not given.get("skip_special_tokens", True),
            bad_words=tuple(given.get("bad_words", ())),
            stop_token_ids=given.get("stop_token_ids", ()),
            ignore_eos=given.get("ignore_eos", False),
            stream=given.get("stream", False),
            reply=ReplyOptions(
                echo=echo,
                prompt_logprobs=given.get("prompt_logprobs"),
                usage_in_stream=options is not None and options.include_usage,
                continuous_usage=options is not None and options.continuous_usage_stats,
                tokens_as_ids=given.get("return_tokens_as_token_ids", False),
                token_ids=given.get("return_token_ids", False),
            ),
            names=replace(names, grammar=grammar_name),
        )

    def _sampling(self, given: Given, names: FieldNames, logprobs: int | None, echo: bool) -> SamplingParams:
        least = given.get("min_tokens", 0)
        most = given.get(names.max_new_tokens)
        if most is None:
            most = max(self.max_tokens, least)
        scores = [given["prompt_logprobs"]] if "prompt_logprobs" in given else []
        if echo and logprobs is not None:
            scores.append(logprobs)
        if most == 0:
            scores.append(0)  # what the engine asks for
        return SamplingParams(
            max_new_tokens=most,
            min_new_tokens=least,
            **{name: given.get(name, default) for name, default in self.sampling.items()},
            logit_bias=given.get("logit_bias", {}),
            seed=given.get("seed", self.seed),
            n=given.get("n", 1),
            logprobs=logprobs,
            prompt_logprobs=max(scores, default=None),
            allowed_ids=given.get("allowed_token_ids"),
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


def _check_pairs(given: Given, names: FieldNames, echo: bool) -> None:
    """ApiError where two fields contradict each other."""
    least, most = given.get("min_tokens", 0), given.get(names.max_new_tokens)
    if most is not None and least > most:
        message = f"min_tokens={least} must be at most {names.max_new_tokens}={most}"
        raise ApiError(400, "invalid_value", message, "min_tokens")
    if most == 0 and not echo and "prompt_logprobs" not in given:
        message = f"{names.max_new_tokens}=0 must be at least 1, or needs echo=true or prompt_logprobs"
        raise ApiError(400, "invalid_value", message, names.max_new_tokens)
    if given.get("stream") and "prompt_logprobs" in given:
        message = "prompt_logprobs is not possible in a stream; leave out one of prompt_logprobs and stream"
        raise ApiError(400, "conflicting_fields", message, "prompt_logprobs")
    if "stream_options" in given and not given.get("stream"):
        message = "stream_options needs stream=true, which is not given"
        raise ApiError(400, "conflicting_fields", message, "stream_options")
