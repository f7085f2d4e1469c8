"""The same weights in other engines, for comparisons and as a test oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_tp.config import ModelArgs

_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def transformers_model(args: ModelArgs, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A transformers LlamaForCausalLM with the given weights (Meta's names and rotary layout), in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=max(args.max_seq_len, 512),
        tie_word_embeddings=args.tied_embeddings,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval().requires_grad_(False)
    theirs = {_their_name(name): _their_layout(name, weight, args) for name, weight in weights.items()}
    if args.tied_embeddings:
        theirs.setdefault("lm_head.weight", theirs["model.embed_tokens.weight"])
    model.load_state_dict(theirs)
    return model


def _their_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def _their_layout(name: str, weight: Tensor, args: ModelArgs) -> Tensor:
    """Hugging Face rotates element i of a head with element i + d / 2, Meta adjacent elements."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return weight
    return weight.unflatten(0, (-1, args.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
