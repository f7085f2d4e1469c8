"""Fields of OpenAI's, vLLM's and llama.cpp's APIs that are not implemented; see `dialects.unsupported`."""

from __future__ import annotations

from typing import Any

from llama_tp.serving.dialects.unsupported import IGNORED, only

_LLAMA_CPP: dict[str, Any] = {
    "cache_prompt": IGNORED,  # prefixes are always cached
    "id_slot": IGNORED,
    "n_keep": IGNORED,  # the context is never shifted
    "n_probs": only(0),
    "min_keep": only(0),
    "samplers": only(),
    "repeat_penalty": only(1.0, 1),  # it sees fewer tokens than repetition_penalty
    "repeat_last_n": only(-1),
    "typical_p": only(1.0, 1),
    "top_n_sigma": only(-1.0, -1),
    "mirostat": only(0),
    "mirostat_tau": IGNORED,  # of mirostat alone
    "mirostat_eta": IGNORED,
    "dynatemp_range": only(0.0, 0),
    "dynatemp_exponent": IGNORED,  # of dynatemp_range alone
    "xtc_probability": only(0.0, 0),
    "xtc_threshold": IGNORED,  # of xtc_probability alone
    "dry_multiplier": only(0.0, 0),
    "dry_base": IGNORED,  # of dry_multiplier alone
    "dry_allowed_length": IGNORED,
    "dry_penalty_last_n": IGNORED,
    "dry_sequence_breakers": IGNORED,
    "lora": only([]),
    "timings_per_token": only(False),
    "return_progress": only(False),
    "return_tokens": only(False),
    "post_sampling_probs": only(False),
}

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
    **_LLAMA_CPP,
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
