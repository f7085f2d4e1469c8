"""GGUF files: quantized weights as they are, where the form is one of ours, or dequantised as they are read.

For "llama", GGUF's converter turns q and k from Hugging Face's layout back to Meta's interleaved rotary pairs: only
names change. The other architectures keep Hugging Face's, and are put into Meta's order as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.gguf_files import open_files
from llama_tp.checkpoint.formats.gguf_metadata import architecture_of, read_args
from llama_tp.checkpoint.formats.quantized import RotaryQuantized, in_one_format
from llama_tp.checkpoint.formats.quantized_gguf import FORM_OF, GgufQuantized
from llama_tp.checkpoint.formats.reader import QuantizedSource, TensorSource
from llama_tp.checkpoint.formats.rotary import in_metas_order, is_rotated
from llama_tp.file_kind import shown
from llama_tp.model.weights import GROUP, weight_shapes, why_not_quantized
from llama_tp.model_args import ModelArgs

_TOP = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
_LAYER = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_ROPE_FREQS = "rope_freqs.weight"
_DENSE = ("F32", "F16", "BF16")


class GGUFReader:
    """A CheckpointReader of a GGUF file, or of all parts of a split one, given any of them. ValueError says what was
    found instead.

    dtype: of the tensors that are not kept quantized; by default float32 if the file's are in float32, else bfloat16
    keep_quantized: keep linear layers of the types Q8_0, Q4_0 and Q4_1 as they are
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None, *, keep_quantized: bool = False) -> None:
        self.files, self.metadata, entries = open_files(Path(path))
        self.path = self.files[0]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        architecture = architecture_of(self.metadata)
        found = {_meta_name(name): entry for name, entry in entries.items()}
        _check_types(self.path, found.values())
        self.dtype = dtype or _dtype_of(found.values())
        rope_freqs = _dequantised(found.pop(_ROPE_FREQS)) if _ROPE_FREQS in found else None
        shapes = {name: _shape(entry) for name, entry in found.items()}
        self.args = read_args(self.metadata, shapes, rope_freqs)
        _check_tensors(self.path, self.args, found)
        rotates_halves = architecture != "llama"
        self.quantized: Mapping[str, QuantizedSource] = {}
        if keep_quantized and why_not_quantized(self.args) is None:
            self.quantized = in_one_format(_quantized(found, self.args, rotates_halves=rotates_halves))
        dense = [name for name in weight_shapes(self.args) if name.removesuffix(".weight") not in self.quantized]
        stored = {name: QuantisedTensor(found[name], shapes[name], self.dtype) for name in dense}
        self.tensors: Mapping[str, TensorSource] = {
            name: in_metas_order(name, one, self.args.head_dim) if rotates_halves else one
            for name, one in stored.items()
        }
        widened = sum(found[name].tensor_type.name not in _DENSE for name in dense)
        self.about: Mapping[str, Any] = {"source": "gguf", "widened_tensors": widened}
        if self.quantized:
            is_tied = self.args.tied_embeddings and "output" not in self.quantized
            self.args = replace(self.args, tied_embeddings=is_tied, quantization_group=GROUP)


def _quantized(found: Mapping[str, Any], args: ModelArgs, *, rotates_halves: bool) -> dict[str, QuantizedSource]:
    """The linear layers in forms of ours, by module. A tied output has the embedding's blocks."""
    names = {name.removesuffix(".weight"): name for name in found if name.endswith(".weight")}
    if args.tied_embeddings:
        names["output"] = names["tok_embeddings"]
    del names["tok_embeddings"]
    quantized: dict[str, QuantizedSource] = {}
    for module, name in names.items():
        kind = found[name].tensor_type.name
        if kind in FORM_OF and len(found[name].shape) == 2:
            source = GgufQuantized(name, kind, found[name].data)
            is_permuted = rotates_halves and is_rotated(f"{module}.weight")
            quantized[module] = RotaryQuantized(source, args.head_dim) if is_permuted else source
    return quantized


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A TensorSource over one tensor of a mapped GGUF file. Rows are dequantised apart, columns are not."""

    entry: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        if dim == 0 and len(self.shape) == 2:
            return _dequantised(self.entry, slice(start, start + length)).to(self.dtype)
        return _dequantised(self.entry).to(self.dtype).narrow(dim, start, length)


def _dequantised(entry: Any, rows: slice = slice(None)) -> Tensor:
    from gguf.quants import dequantize

    array = dequantize(entry.data[rows], entry.tensor_type)
    # float32 comes as a view of the file, which torch cannot take.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _meta_name(name: str) -> str:
    """Meta's name of a GGUF tensor; a name that is none of ours stays, and is refused as unexpected."""
    stem, _, parameter = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{parameter}"
    prefix, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    return f"layers.{layer}.{_LAYER[kind]}.{parameter}" if prefix == "blk" and kind in _LAYER else name


def _shape(entry: Any) -> tuple[int, ...]:
    return tuple(reversed(entry.shape.tolist()))


def _dtype_of(entries: Iterable[Any]) -> torch.dtype:
    return torch.float32 if {entry.tensor_type.name for entry in entries} <= {"F32"} else torch.bfloat16


def _check_types(path: Path, entries: Iterable[Any]) -> None:
    """ValueError if a tensor is in a type that the gguf package cannot dequantise: one block of each is tried."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    first_of = {entry.tensor_type: entry for entry in reversed(list(entries))}
    for kind, entry in first_of.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(
                f"{path}: tensor {shown(entry.name)} is of type {kind.name}, which the gguf package cannot dequantise; "
                "get the model in another quantization"
            ) from None


def _check_tensors(path: Path, args: ModelArgs, found: Mapping[str, Any]) -> None:
    shapes = weight_shapes(args)
    if odd := sorted(shapes.keys() ^ found.keys()):
        state = "missing" if odd[0] in shapes else "unexpected"
        raise ValueError(
            f"{path}: tensor {shown(odd[0])} is {state} ({len(odd)} in all); expected those of a dense model"
        )
    for name, shape in shapes.items():
        if (actual := _shape(found[name])) != shape:
            raise ValueError(f"{path}: {name} has shape {actual}, expected {shape} from the metadata")
