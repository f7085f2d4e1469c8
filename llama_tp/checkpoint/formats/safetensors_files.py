"""The safetensors files of a folder: one, or several and their index.

The safetensors package checks headers against the file's size (https://github.com/huggingface/safetensors); values are
read a slice at a time, from a memory mapping. Nothing in them can be executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_tp.checkpoint.formats.huggingface_config import read_object
from llama_tp.file_kind import check_link, read_head, shown, why_no_content

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Of weights, by the format's names; others are refused."""
PACKED = {"I32": torch.int32, "I64": torch.int64}
"""Of the integers of GPTQ and AWQ."""


@dataclass(frozen=True, slots=True)
class FileNames:
    """What a format calls its files."""

    single: str
    """All weights in one file."""
    index: str
    """Says which tensor is in which of several files."""


HUGGING_FACE = FileNames("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A TensorSource over one tensor of a file, unchanged."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Any = field(repr=False)

    def read(self, dim: int, start: int, length: int) -> Tensor:
        index = (slice(None),) * dim + (slice(start, start + length),)
        values: Tensor = self.file.get_slice(self.name)[index]
        return values


def open_tensors(
    folder: Path, names: FileNames = HUGGING_FACE, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, StoredTensor]:
    """All tensors of a folder, by their names in the files. ValueError names a missing or damaged file, or a tensor of
    none of `dtypes`."""
    if (folder / names.single).is_file():
        return _open_file(folder, names.single, dtypes)
    index = folder / names.index
    if not index.is_file():
        raise ValueError(_why_no_weights(folder))
    check_link(folder, index)
    weight_map = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing, but {index.name} names it; download it again")
        found = _open_file(folder, shard, dtypes)
        if absent := {name for name, file in weight_map.items() if file == shard} - found.keys():
            name = shown(min(absent))
            raise ValueError(
                f"{folder / shard}: {name} is missing, but {index.name} says it is there; download both again"
            )
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"{folder / shard}: {shown(min(twice))} is in {tensors[min(twice)].path.name} as well")
        tensors |= found
    return tensors


def check_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """ValueError unless the files hold exactly these tensors. `source`: the file that the shapes are from."""
    _check_names(folder, stored, shapes, source)
    for name, shape in shapes.items():
        found = stored[name]
        if found.shape != shape:
            raise ValueError(f"{found.path}: {name} has shape {found.shape}, expected {shape} from {source}")


def _check_names(folder: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, object], source: str) -> None:
    for what, names in (("missing", shapes.keys() - stored.keys()), ("unexpected", stored.keys() - shapes.keys())):
        if names:
            first = sorted(names)[:4]
            where = stored[first[0]].path if first[0] in stored else folder
            listed = ", ".join(map(shown, first)) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"{where}: {len(names)} tensor(s) {what}: {listed}; expected those of {source}")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of its file."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must map tensors to files; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {shown(name)} is said to be in {shown(repr(file))}, expected a .safetensors file of this "
                "folder"
            )
    return weight_map


def _open_file(folder: Path, name: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, StoredTensor]:
    path = folder / name
    check_link(folder, path)
    head = read_head(path)
    if problem := why_no_content(head):
        raise ValueError(f"{path} {problem}")
    if head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} was written by torch.save, not in safetensors format; download it again")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({str(error).splitlines()[0]}); download it again") from None
    names: list[str] = file.keys()
    return {name: _stored(path, name, file, dtypes) for name in names}


def _stored(path: Path, name: str, file: Any, dtypes: Mapping[str, torch.dtype]) -> StoredTensor:
    header = file.get_slice(name)
    if (dtype := header.get_dtype()) not in dtypes:
        raise ValueError(
            f"{path}: {shown(name)} is {dtype}, expected {', '.join(dtypes)}: of quantized weights only those of GPTQ "
            "and AWQ are supported"
        )
    return StoredTensor(path, name, tuple(header.get_shape()), dtypes[dtype], file)


def _why_no_weights(folder: Path) -> str:
    """What the folder has instead, and what to do."""
    names = {path.name for path in folder.iterdir()}
    if pickles := sorted(name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")):
        return (
            f"{folder} holds {pickles[0]}, a pickle, which is not loaded; download the model's safetensors, or write "
            "them with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        )
    if (folder / "original" / "params.json").is_file():
        originals = folder / "original"
        return f"{folder} has no {HUGGING_FACE.single}; Meta's original weights are in {originals}: convert that folder"
    if any(name.startswith("model-") and name.endswith(".safetensors") for name in names):
        return f"{folder / HUGGING_FACE.index} is missing; without it the shards cannot be read; download it again"
    return (
        f"{folder} has a config.json, but neither {HUGGING_FACE.single} nor {HUGGING_FACE.index}; download the weights"
    )
