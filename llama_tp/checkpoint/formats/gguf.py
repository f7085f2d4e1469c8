"""GGUF files of architecture "llama": weights, dequantised one tensor at a time, and architecture.

GGUF's converter turns q and k from Hugging Face's layout back to Meta's interleaved rotary pairs: only names change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.gguf_header import check_header
from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes

_TOP = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
_LAYER = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}


class GGUFReader:
    """A CheckpointReader of one GGUF file; every tensor comes in `dtype`. ValueError says what was found instead."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.path = Path(path)
        self.dtype = dtype
        self.files = [self.path]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = {"source": "gguf"}
        self._file = _open(self.path)
        if (architecture := self.field("general.architecture")) != "llama":
            raise ValueError(f"{self.path} holds a model of architecture {architecture!r}, only 'llama' is read")
        found = {_meta_name(tensor.name): tensor for tensor in self._file.tensors}
        self.args = replace(_model_args(self), tied_embeddings="output.weight" not in found)
        shapes = weight_shapes(self.args)
        if odd := sorted(shapes.keys() ^ found.keys()):
            state = "missing" if odd[0] in shapes else "unexpected"
            raise ValueError(
                f"{self.path}: tensor {odd[0]} is {state} ({len(odd)} in all): this is no plain Llama model"
            )
        for name, shape in shapes.items():
            if (actual := tuple(reversed(found[name].shape.tolist()))) != shape:
                raise ValueError(f"{self.path}: {name} has shape {actual}, expected {shape} from the metadata")
        self.tensors: Mapping[str, TensorSource] = {
            name: QuantisedTensor(found[name], shapes[name], dtype) for name in shapes
        }

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value."""
        field = self._file.fields.get(key)
        return default if field is None else field.contents()


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A TensorSource over one tensor of a mapped GGUF file. Rows are dequantised apart, columns are not."""

    entry: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        from gguf.quants import dequantize

        rows = self.entry.data
        if dim == 0 and len(self.shape) == 2:
            rows = rows[start : start + length]
        try:
            array = dequantize(rows, self.entry.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"tensor {self.entry.name}: {error}") from None
        # float32 comes as a view of the file, which torch cannot take.
        values = torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.dtype)
        return values if rows is not self.entry.data else values.narrow(dim, start, length)


def _open(path: Path) -> Any:
    """The gguf package's reader of a file that was found sound."""
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF needs the gguf package: pip install 'llama-tp[demo]'") from None
    check_header(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a sound GGUF file: {str(error).splitlines()[0]}") from None


def _meta_name(name: str) -> str:
    """Meta's name of a GGUF tensor; a name that is none of Llama's stays, and is refused as unexpected."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    prefix, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    return f"layers.{layer}.{_LAYER[kind]}.weight" if prefix == "blk" and kind in _LAYER else name


def _model_args(reader: GGUFReader) -> ModelArgs:
    def need(key: str) -> Any:
        if (value := reader.field(f"llama.{key}")) is None:
            raise ValueError(f"{reader.path}: metadata llama.{key} is missing")
        return value

    if (scaling := reader.field("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{reader.path}: llama.rope.scaling.type={scaling!r} is not supported")
    args = ModelArgs.from_params(
        {
            "dim": need("embedding_length"),
            "n_layers": need("block_count"),
            "n_heads": need("attention.head_count"),
            "n_kv_heads": reader.field("llama.attention.head_count_kv"),
            "vocab_size": len(reader.field("tokenizer.ggml.tokens", ())) or need("vocab_size"),
            "norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(reader.field("llama.rope.freq_base", 10000.0)),
        }
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if (size := reader.field(f"llama.{key}", args.head_dim)) != args.head_dim:
            raise ValueError(f"{reader.path}: llama.{key}={size}, expected the head size {args.head_dim}")
    hidden = need("feed_forward_length")
    return args if args.hidden_dim == hidden else replace(args, ffn_hidden_dim=hidden)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(f"{value:.7g}")
