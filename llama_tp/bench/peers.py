"""The same weights in other engines, for comparisons and as a test oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.huggingface import hugging_face_name
from llama_tp.checkpoint.formats.rotary import in_halves, is_rotated
from llama_tp.checkpoint.store.reading import StoredFiles, load
from llama_tp.model.random_weights import RandomWeights
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs, RopeScaling


def transformers_model(args: ModelArgs, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A transformers model with the given weights (Meta's names and rotary layout), in eval mode.

    ValueError for a combination of features that none of its Llama-like models has.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(_config(args))
    model = model.to(dtype).eval().requires_grad_(False)
    theirs = {
        hugging_face_name(name): in_halves(weight, args.head_dim) if is_rotated(name) else weight
        for name, weight in weights.items()
    }
    if args.tied_embeddings:
        theirs.setdefault("lm_head.weight", theirs["model.embed_tokens.weight"])
    model.load_state_dict(theirs)
    return model


def dense_weights(args: ModelArgs, checkpoint: str | None) -> dict[str, Tensor]:
    """All weights of a model as plain tensors: of a checkpoint, in its dtype, or the random ones that an engine without
    a checkpoint has. ValueError if the checkpoint is quantized."""
    if checkpoint is None:
        weights = RandomWeights("cpu")
        return {name: weights.tensor(name, shape, torch.bfloat16) for name, shape in weight_shapes(args).items()}
    files = StoredFiles(checkpoint)
    if files.formats:
        raise ValueError(f"{checkpoint} is quantized; the comparison needs dense weights")
    tensors = {name: torch.empty(shape, dtype=files.dtype) for name, shape in weight_shapes(args).items()}
    load(tensors, checkpoint)
    return tensors


def _config(args: ModelArgs) -> Any:
    """Of LlamaForCausalLM, or of Qwen's models where only they have what `args` asks for."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    biases: dict[str, Any] = {"attention_bias": args.qkv_bias, "mlp_bias": args.ffn_bias}
    if args.qkv_bias and not (args.wo_bias or args.ffn_bias or args.qk_norm):
        return Qwen2Config(**_common(args))
    if args.qkv_bias != args.wo_bias or (args.qk_norm and args.ffn_bias):
        names = ("qkv_bias", "wo_bias", "ffn_bias", "qk_norm")
        found = ", ".join(f"{name}={getattr(args, name)}" for name in names)
        raise ValueError(f"transformers has no Llama-like model with {found}")
    return Qwen3Config(**_common(args), **biases) if args.qk_norm else LlamaConfig(**_common(args), **biases)


def _common(args: ModelArgs) -> dict[str, Any]:
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_theta": args.rope_theta, **_rope_scaling(args.rope_scaling)},
        "max_position_embeddings": max(args.max_seq_len, 512),
        "tie_word_embeddings": args.tied_embeddings,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
