"""Tiny models as Mistral AI publishes them: params.json and consolidated.safetensors, from a model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_gguf import permuted

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""As transformers/models/mistral/convert_mistral_weights_to_hf.py maps them, the other way."""


def mistral_params(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
    }


def mistral_tensors(model: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        ours = name.removesuffix(".weight")
        for theirs, own in NAMES.items():
            ours = ours.replace(theirs, own)
        values = tensor.float().numpy()
        if ours.endswith((".wq", ".wk")):
            heads = model.config.num_attention_heads if ours.endswith("q") else model.config.num_key_value_heads
            values = permuted(values, heads)
        tensors[ours.removeprefix("model.") + ".weight"] = torch.from_numpy(values.copy()).to(tensor.dtype)
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def write_mistral(folder: Path, model: Any, **params: Any) -> Path:
    """The folder. `params`: changes of params.json; None takes a key away."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(mistral_tensors(model), folder / "consolidated.safetensors")
    write_params(folder, model, **params)
    return folder


def write_params(folder: Path, model: Any, **changes: Any) -> None:
    values = {**mistral_params(model), **changes}
    (folder / "params.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
