"""Hugging Face's format: config.json, and weights in safetensors under transformers' names.

transformers rotates pairs of elements from the two halves of a head, Meta pairs of adjacent elements. So the rows of q
and k, their biases and their norm weights are put into Meta's order while they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_tp.checkpoint.formats.huggingface_config import read_config
from llama_tp.checkpoint.formats.quantization_config import QuantizationConfig
from llama_tp.checkpoint.formats.quantized import Dequantized, RotaryQuantized, in_one_format
from llama_tp.checkpoint.formats.quantized_awq import AwqQuantized
from llama_tp.checkpoint.formats.quantized_gptq import GptqQuantized
from llama_tp.checkpoint.formats.reader import QuantizedSource, TensorSource
from llama_tp.checkpoint.formats.rotary import in_metas_order, is_rotated
from llama_tp.checkpoint.formats.safetensors_files import (
    DTYPES,
    HUGGING_FACE,
    PACKED,
    StoredTensor,
    check_tensors,
    open_tensors,
)
from llama_tp.file_kind import check_link
from llama_tp.model.weights import GROUP, weight_shapes, why_not_quantized
from llama_tp.model_args import ModelArgs

CONFIG = "config.json"
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096
_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, not Meta's shards with a config.json."""
    return (folder / CONFIG).is_file() and not any(folder.glob("consolidated.*.pth"))


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights under the names of this format."""
    return any((folder / name).is_file() for name in (HUGGING_FACE.single, HUGGING_FACE.index))


def hugging_face_name(name: str) -> str:
    """transformers' name of a weight or bias, from Meta's."""
    module, _, parameter = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{parameter}"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}.{parameter}"


class HuggingFaceReader:
    """A CheckpointReader of a model in transformers' format. The constructor checks everything except the values.

    ValueError, one line, names the file, the tensor or key, what was found and what was expected.

    dtype: of packed layers that cannot stay quantized; None: that of the embedding
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder = Path(folder)
        check_link(self.folder, self.folder / CONFIG)
        architecture, self.args, quantization = read_config(self.folder / CONFIG)
        dtypes = DTYPES if quantization is None else DTYPES | PACKED
        # Rotary frequencies, which old versions stored, are computed from config.json.
        stored = {
            name: tensor
            for name, tensor in open_tensors(self.folder, dtypes=dtypes).items()
            if not name.endswith(".rotary_emb.inv_freq")
        }
        self.files = sorted({tensor.path for tensor in stored.values()})
        packed = {} if quantization is None else _pop_packed(self.folder, self.args, stored, quantization)
        if "output" not in packed:
            _check_output(self.folder, self.args, stored)
        dense = [name for name in weight_shapes(self.args) if name.removesuffix(".weight") not in packed]
        shapes = {hugging_face_name(name): weight_shapes(self.args)[name] for name in dense}
        check_tensors(self.folder, stored, shapes, CONFIG)
        self.dtype = stored[_EMBEDDING].dtype
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = {"source": "huggingface", "architecture": architecture}
        if quantization is not None:
            self.about = {**self.about, "quantized": quantization.method}
        kept = in_one_format(packed) if why_not_quantized(self.args) is None else {}
        self.quantized: Mapping[str, QuantizedSource] = kept
        self.tensors: Mapping[str, TensorSource] = {
            name: Dequantized(packed[module], dtype or self.dtype)
            if module in packed
            else in_metas_order(name, stored[hugging_face_name(name)], self.args.head_dim)
            for name in weight_shapes(self.args)
            if (module := name.removesuffix(".weight")) not in kept
        }
        if kept:
            self.args = replace(self.args, quantization_group=GROUP)


def _pop_packed(
    folder: Path, args: ModelArgs, stored: dict[str, StoredTensor], quantization: QuantizationConfig
) -> dict[str, QuantizedSource]:
    """The layers whose weights are packed, by Meta's names; their tensors are removed from `stored`. ValueError if one
    of them is not what config.json says."""
    packed: dict[str, QuantizedSource] = {}
    shapes = weight_shapes(args)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        theirs = hugging_face_name(name).removesuffix(".weight")
        if f"{theirs}.qweight" not in stored:
            continue
        tensors = {kind: stored.pop(f"{theirs}.{kind}") for kind in _PACKED if f"{theirs}.{kind}" in stored}
        try:
            source = _open_packed(theirs, tensors, quantization)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        if source.shape != shape:
            raise ValueError(
                f"{folder}: {theirs}.qweight is of a {source.shape} matrix, expected {shape} from {CONFIG}"
            )
        packed[module] = RotaryQuantized(source, args.head_dim) if is_rotated(name) else source
        if f"{module}.bias" not in shapes:
            _drop_zeros(f"{theirs}.bias", stored)
    return packed


def _drop_zeros(name: str, stored: dict[str, StoredTensor]) -> None:
    """Remove a bias that the architecture lacks from `stored` if it is zero: AutoGPTQ wrote one for every layer."""
    if name in stored and stored[name].shape and not stored[name].read(0, 0, stored[name].shape[0]).any():
        del stored[name]


def _open_packed(module: str, tensors: dict[str, StoredTensor], quantization: QuantizationConfig) -> QuantizedSource:
    if quantization.method == "awq":
        return AwqQuantized(module, tensors, quantization.group_size)
    return GptqQuantized(module, tensors, quantization.group_size, zeros_less_one=quantization.zeros_less_one)


def _check_output(folder: Path, args: ModelArgs, stored: dict[str, StoredTensor]) -> None:
    """Remove the output from `stored` if it is a copy of the embedding. ValueError if config.json and the files
    disagree on whether it is."""
    said = f"{folder / CONFIG} says tie_word_embeddings={str(args.tied_embeddings).lower()}"
    if not args.tied_embeddings and _OUTPUT not in stored:
        raise ValueError(f"{said}, but there is no {_OUTPUT}: set it to true if the model ties them, or download it")
    if args.tied_embeddings and _OUTPUT in stored:
        if _EMBEDDING in stored and not _are_equal(stored[_OUTPUT], stored[_EMBEDDING]):
            path = stored[_OUTPUT].path
            raise ValueError(f"{said}, but {_OUTPUT} in {path.name} is not {_EMBEDDING}: set it to false to use both")
        del stored[_OUTPUT]


def _are_equal(one: StoredTensor, two: StoredTensor) -> bool:
    """Compare a few rows at a time."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    blocks = ((start, min(_COMPARED_ROWS, one.shape[0] - start)) for start in range(0, one.shape[0], _COMPARED_ROWS))
    return all(torch.equal(one.read(0, *block), two.read(0, *block)) for block in blocks)
