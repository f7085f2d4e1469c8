"""Writes Hugging Face's format: config.json, and safetensors under transformers' names and in its order of q and k."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_tp.checkpoint.formats.huggingface import CONFIG, hugging_face_name
from llama_tp.checkpoint.formats.quantized import num_bytes
from llama_tp.checkpoint.formats.reader import CheckpointReader, blocks_of_rows
from llama_tp.checkpoint.formats.rotary import in_halves, is_rotated
from llama_tp.checkpoint.formats.safetensors_files import HUGGING_FACE
from llama_tp.checkpoint.formats.safetensors_writer import Layout, split_into_files, write_safetensors
from llama_tp.checkpoint.memory import RecycledMemory
from llama_tp.checkpoint.progress import Advance
from llama_tp.checkpoint.store.manifest import FileEntry
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.text.tokenizer import Tokenizer

MAX_FILE_BYTES = 5 * 10**9


class HuggingFaceWriter:
    """A CheckpointWriter for transformers. Holds one block of rows."""

    def __init__(self, reader: CheckpointReader, tokenizer: Tokenizer | None) -> None:
        self._reader = reader
        self._memory = RecycledMemory()
        self._config = hugging_face_config(reader.args, str(reader.dtype).removeprefix("torch."), tokenizer)

    def write(self, folder: Path, advance: Advance) -> Mapping[str, FileEntry]:
        (folder / CONFIG).write_text(json.dumps(self._config, indent=2) + "\n")
        tensors = self._reader.tensors
        layouts = {name: Layout(source.shape, source.dtype) for name, source in tensors.items()}
        parts = list(split_into_files(layouts, MAX_FILE_BYTES))
        files: dict[str, FileEntry] = {}
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts, 1):
            file = HUGGING_FACE.single if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            named = {hugging_face_name(name): layout for name, layout in part.items()}
            files[file] = write_safetensors(folder / file, named, self._blocks(part, advance))
            weight_map |= dict.fromkeys(named, file)
        if len(parts) > 1:
            index = {"metadata": {"total_size": num_bytes(self._reader)}, "weight_map": weight_map}
            (folder / HUGGING_FACE.index).write_text(json.dumps(index, indent=2) + "\n")
        return files

    def _blocks(self, names: Iterable[str], advance: Advance) -> Iterator[Tensor]:
        for name in names:
            unit = self._reader.args.head_dim if is_rotated(name) else 1
            source = self._reader.tensors[name]
            for block in blocks_of_rows(source, 0, source.shape[0], unit):
                yield self._in_halves(block, unit) if is_rotated(name) else block
                advance(block.nbytes)

    def _in_halves(self, block: Tensor, head_dim: int) -> Tensor:
        return self._memory.tensor(block.shape, block.dtype).copy_(in_halves(block, head_dim))


def hugging_face_config(args: ModelArgs, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json in the keys of transformers 4, which 5 reads, too. ValueError if none of its models is this one."""
    architecture, features = _architecture(args)
    stop_ids = sorted(tokenizer.stop_ids) if tokenizer else []
    rope = _rope(args.rope_scaling)
    longest = args.max_seq_len
    if args.rope_scaling is not None and args.rope_scaling.kind == "llama3":
        longest = max(longest, int(args.rope_scaling.factor * args.rope_scaling.original_max_seq_len))
    if args.context_limit is not None and "sliding_window" not in features:
        if rope is not None:
            raise ValueError(
                f"transformers has no {architecture} with both rope_scaling and context_limit={args.context_limit}"
            )
        # Within the limit, its frequencies are the plain ones.
        rope, longest = {"rope_type": "dynamic", "factor": 1.0}, args.context_limit
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": args.tied_embeddings,
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids or None,
        "torch_dtype": dtype,
        **features,
    }


def _architecture(args: ModelArgs) -> tuple[str, dict[str, Any]]:
    """The class of transformers that computes the model, and the keys that only it has."""
    biases = (args.qkv_bias, args.wo_bias, args.ffn_bias)
    window = {} if args.context_limit is None else {"sliding_window": args.context_limit}
    if window and (args.qk_norm or any(biases)):
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    if args.qk_norm and args.qkv_bias == args.wo_bias and not args.ffn_bias:
        return "Qwen3ForCausalLM", {"attention_bias": args.qkv_bias, **window}
    if not args.qk_norm and biases == (True, False, False):
        return "Qwen2ForCausalLM", window
    if not args.qk_norm and args.qkv_bias == args.wo_bias:
        if window and not any(biases):
            return "MistralForCausalLM", window
        return "LlamaForCausalLM", {"attention_bias": args.qkv_bias, "mlp_bias": args.ffn_bias}
    names = ("qkv_bias", "wo_bias", "ffn_bias", "qk_norm")
    found = ", ".join(f"{name}={str(getattr(args, name)).lower()}" for name in names)
    raise ValueError(f"transformers has no Llama-like model with {found}")


def _rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
