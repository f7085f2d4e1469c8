"""Fields of OpenAI's and vLLM's APIs that are not implemented.

A value that would change the answer is refused with the code unsupported_value; any other is accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.serving.encoding import to_json

IGNORED = Annotated[Any, Field(description="Accepted and ignored.")]
"""A field without effect on the answer, whatever its value."""


def only(*harmless: object) -> Any:
    """A field that is refused unless its value is one of these, which ask for nothing."""
    instead = "".join(f" or send {to_json(value).decode()}" for value in harmless[:1])

    def check(value: object) -> object:
        if not any(type(value) is type(one) and value == one for one in harmless):
            context = {"instead": instead}
            raise PydanticCustomError("unsupported_value", "is not supported; leave it out{instead}", context)
        return value

    return Annotated[
        Any,
        AfterValidator(check),
        Field(description="Not supported: only values that ask for nothing are accepted."),
        WithJsonSchema({"enum": list(harmless)}),
    ]


EVERYWHERE: dict[str, Any] = {
    "user": IGNORED,
    "metadata": IGNORED,
    "store": only(False),
    "service_tier": IGNORED,
    "safety_identifier": IGNORED,
    "prompt_cache_key": IGNORED,
    "prompt_cache_retention": IGNORED,
    # vLLM's
    "best_of": only(1),
    "use_beam_search": only(False),
    "length_penalty": IGNORED,  # of beam search alone
    "early_stopping": only(False),
    "include_stop_str_in_output": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": IGNORED,  # there are none in the text
    "truncate_prompt_tokens": only(),
    "prompt_logprobs": only(),
    "return_tokens_as_token_ids": only(False),
    "bad_words": only([]),
    "allowed_token_ids": only(),
    "logits_processors": only([]),
    "structured_outputs": only(),
    "guided_json": only(),
    "guided_regex": only(),
    "guided_choice": only(),
    "guided_grammar": only(),
    "guided_decoding_backend": IGNORED,
    "priority": only(0),
    "cache_salt": only(),
    "kv_transfer_params": only(),
    "response_format": only({"type": "text"}),
}
"""Name and type of fields of both completion routes."""

CHAT: dict[str, Any] = {
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "parallel_tool_calls": IGNORED,
    "functions": only([]),
    "function_call": only("none", "auto"),
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": IGNORED,  # a way to the same answer
    "reasoning_effort": only(),
    "verbosity": only(),
    "web_search_options": only(),
    # vLLM's
    "echo": only(False),
    "add_special_tokens": only(False),
    "documents": only([]),
    "chat_template": only(),
    "chat_template_kwargs": only({}),
    "mm_processor_kwargs": only({}),
    "include_reasoning": IGNORED,  # it is never separated from the text
}
"""Those of v1/chat/completions."""

COMPLETIONS: dict[str, Any] = {
    "suffix": only(""),
    "add_special_tokens": only(True),
    "prompt_embeds": only(),
}
"""Those of v1/completions."""
