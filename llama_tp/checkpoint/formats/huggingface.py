"""Hugging Face's format: config.json, and weights in safetensors under transformers' names.

transformers rotates the two halves of a head against each other, Meta neighbouring elements. So the rows of q and k are
put back into Meta's order as they are read, with their biases and the weights of their norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.huggingface_config import read_config
from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.checkpoint.formats.safetensors_files import StoredTensor, check_link, open_tensors
from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes

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


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, and not Meta's shards beside a config.json."""
    return (folder / CONFIG).is_file() and not any(folder.glob("consolidated.*.pth"))


def hugging_face_name(name: str) -> str:
    """transformers' name of a weight or bias that Meta's style names so."""
    module, _, parameter = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{parameter}"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}.{parameter}"


def is_rotated(name: str) -> bool:
    """Whether a weight or bias, by Meta's name, belongs to a module whose output is rotated, or multiplies what is."""
    return name.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm")


class HuggingFaceReader:
    """A CheckpointReader of a model in transformers' form. Everything but the values is checked when it is made.

    ValueError, one line, names the file, the tensor or key, what was found and what was expected.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_link(self.folder, self.folder / CONFIG)
        architecture, self.args = read_config(self.folder / CONFIG)
        # Rotary frequencies, which old versions stored, are computed from config.json.
        stored = {
            name: tensor
            for name, tensor in open_tensors(self.folder).items()
            if not name.endswith(".rotary_emb.inv_freq")
        }
        if self.args.n_layers > len(stored):  # names for so many layers might not even fit into memory
            raise ValueError(
                f"{self.folder} holds {len(stored)} tensors: too few for num_hidden_layers={self.args.n_layers}"
            )
        _check_output(self.folder, self.args, stored)
        _check_tensors(self.folder, self.args, stored)
        self.dtype = stored[_EMBEDDING].dtype
        self.files = sorted({tensor.path for tensor in stored.values()})
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = {"source": "huggingface", "architecture": architecture}
        self.tensors: Mapping[str, TensorSource] = {
            name: _source(name, stored[hugging_face_name(name)], self.args.head_dim)
            for name in weight_shapes(self.args)
        }


@dataclass(frozen=True, slots=True)
class RotaryTensor:
    """A TensorSource that gives the rows of whole heads in Meta's order. Holds up to two heads more than are read."""

    stored: StoredTensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        if dim != 0:
            return self.stored.read(dim, start, length)[self._their_rows(0, self.shape[0])]
        first = start // self.head_dim * self.head_dim
        end = -(-(start + length) // self.head_dim) * self.head_dim
        return self.stored.read(0, first, end - first)[self._their_rows(start, length) - first]

    def _their_rows(self, start: int, length: int) -> Tensor:
        """Where the rows start, start + 1, ... of Meta's order are stored: (first, second) of all pairs side by side
        became all first, then all second."""
        rows = torch.arange(start, start + length)
        head, within = rows // self.head_dim, rows % self.head_dim
        return head * self.head_dim + within % 2 * (self.head_dim // 2) + within // 2


def _source(name: str, stored: StoredTensor, head_dim: int) -> TensorSource:
    return RotaryTensor(stored, head_dim) if is_rotated(name) else stored


def _check_output(folder: Path, args: ModelArgs, stored: dict[str, StoredTensor]) -> None:
    """Take the output out of `stored` where it is the embedding once more. ValueError if config.json and the files
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
    """A few rows at a time."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    blocks = ((start, min(_COMPARED_ROWS, one.shape[0] - start)) for start in range(0, one.shape[0], _COMPARED_ROWS))
    return all(torch.equal(one.read(0, *block), two.read(0, *block)) for block in blocks)


def _check_tensors(folder: Path, args: ModelArgs, stored: Mapping[str, StoredTensor]) -> None:
    shapes = {hugging_face_name(name): shape for name, shape in weight_shapes(args).items()}
    _check_names(folder, stored, shapes)
    dtype = stored[_EMBEDDING].dtype
    for name, shape in shapes.items():
        found = stored[name]
        if found.shape != shape:
            raise ValueError(f"{found.path}: {name} has shape {found.shape}, expected {shape} from {CONFIG}")
        if found.dtype != dtype:
            raise ValueError(
                f"{found.path}: {name} is {found.dtype}, expected {dtype} as {_EMBEDDING}: mixed types are not read; "
                "save the model in one type"
            )


def _check_names(folder: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, object]) -> None:
    for what, names in (("missing", shapes.keys() - stored.keys()), ("unexpected", stored.keys() - shapes.keys())):
        if names:
            first = sorted(names)[:4]
            where = stored[first[0]].path if first[0] in stored else folder
            listed = ", ".join(first) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"{where}: {len(names)} tensor(s) {what}: {listed}; expected those of {CONFIG}")
