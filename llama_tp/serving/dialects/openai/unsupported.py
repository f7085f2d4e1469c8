"""Fields of OpenAI's and vLLM's APIs that are not implemented; see `dialects.unsupported`."""

from __future__ import annotations

from typing import Any

from llama_tp.serving.dialects.unsupported import IGNORED, only

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
    "spaces_between_special_tokens": IGNORED,  # there are none in the text
    "logits_processors": only([]),
    "guided_decoding_backend": IGNORED,
    "guided_whitespace_pattern": only(),
    "priority": only(0),
    "cache_salt": only(),
    "kv_transfer_params": only(),
    "request_id": IGNORED,  # X-Request-Id is TorchServe's
    "vllm_xargs": only({}),
}
"""Name and type of fields of both completion routes."""

CHAT: dict[str, Any] = {
    "functions": only([]),
    "function_call": only("none", "auto"),
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": IGNORED,  # a way to the same answer
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),  # OpenAI's default
    "web_search_options": only(),
    # vLLM's
    "echo": only(False),
    "add_special_tokens": only(False),
    "documents": only([]),
    "chat_template": only(),
    "mm_processor_kwargs": only({}),
    "include_reasoning": IGNORED,  # it is never separated from the text
}
"""Those of v1/chat/completions."""

COMPLETIONS: dict[str, Any] = {
    "suffix": only(""),
    "prompt_embeds": only(),
}
"""Those of v1/completions."""
