"""Mistral AI's own format: params.json, and weights in consolidated.safetensors under Meta's names and in its order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.params import PARAMS, read_params
from llama_tp.checkpoint.formats.reader import QuantizedSource, TensorSource
from llama_tp.checkpoint.formats.safetensors_files import FileNames, check_tensors, open_tensors
from llama_tp.file_kind import check_link
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs

CONSOLIDATED = FileNames("consolidated.safetensors", "consolidated.safetensors.index.json")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


def is_consolidated(folder: Path) -> bool:
    """Whether a folder holds weights in this format."""
    return any((folder / name).is_file() for name in (CONSOLIDATED.single, CONSOLIDATED.index))


class ConsolidatedReader:
    """A CheckpointReader of consolidated.safetensors, or of its parts and their index.

    The constructor checks everything except the values. ValueError, one line, names the file, the tensor or key, what
    was found and what was expected.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_link(self.folder, self.folder / PARAMS)
        args = read_params(self.folder / PARAMS)
        stored = open_tensors(self.folder, CONSOLIDATED)
        if (embedding := stored.get(_EMBEDDING)) is None:
            raise ValueError(f"{self.folder}: {_EMBEDDING} is missing in {CONSOLIDATED.single}")
        if args.tied_embeddings and _OUTPUT in stored:
            raise ValueError(
                f"{self.folder / PARAMS} says tied_embeddings=true, but there is {_OUTPUT}: set it to false to use it"
            )
        try:
            args = args.with_vocab_size(embedding.shape[0])
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        self.args = ModelArgs.from_params({**args.to_dict(), "tied_embeddings": _OUTPUT not in stored})
        shapes = weight_shapes(self.args)
        check_tensors(self.folder, stored, shapes, PARAMS)
        self.dtype = embedding.dtype
        self.files = sorted({tensor.path for tensor in stored.values()})
        self.expected_md5s: Mapping[Path, frozenset[str]] = {}
        self.about: Mapping[str, Any] = {"source": "consolidated"}
        self.quantized: Mapping[str, QuantizedSource] = {}
        self.tensors: Mapping[str, TensorSource] = {name: stored[name] for name in shapes}
