"""GGUF files: weights, dequantised one tensor at a time.

For "llama", GGUF's converter turns q and k from Hugging Face's layout back to Meta's interleaved rotary pairs: only
names change. The other architectures keep Hugging Face's, and are put into Meta's order as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.gguf_files import open_files
from llama_tp.checkpoint.formats.gguf_metadata import architecture_of, read_args
from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.checkpoint.formats.rotary import in_metas_order
from llama_tp.config import ModelArgs
from llama_tp.file_kind import shown
from llama_tp.model.weights import weight_shapes

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


class GGUFReader:
    """A CheckpointReader of a GGUF file, or of all parts of a split one, given any of them; every tensor comes in
    `dtype`. ValueError says what was found instead.

    dtype: by default float32 if the file's tensors are in float32, else bfloat16
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        self.files, self.metadata, entries = open_files(Path(path))
        self.path = self.files[0]
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = {"source": "gguf"}
        architecture = architecture_of(self.metadata)
        found = {_meta_name(name): entry for name, entry in entries.items()}
        _check_types(self.path, found.values())
        self.dtype = dtype or _dtype_of(found.values())
        rope_freqs = _dequantised(found.pop(_ROPE_FREQS)) if _ROPE_FREQS in found else None
        shapes = {name: _shape(entry) for name, entry in found.items()}
        self.args = read_args(self.metadata, shapes, rope_freqs)
        _check_tensors(self.path, self.args, found)
        stored = {name: QuantisedTensor(entry, shapes[name], self.dtype) for name, entry in found.items()}
        self.tensors: Mapping[str, TensorSource] = {
            name: stored[name] if architecture == "llama" else in_metas_order(name, stored[name], self.args.head_dim)
            for name in weight_shapes(self.args)
        }


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
