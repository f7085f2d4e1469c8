"""Opens a foreign checkpoint, and detects its format."""

from __future__ import annotations

from pathlib import Path

import torch

from llama_tp.checkpoint.formats.consolidated import CONSOLIDATED, ConsolidatedReader, is_consolidated
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.gguf_tokenizer import write_tokenizer
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader, has_weights, is_hugging_face
from llama_tp.checkpoint.formats.quantizing import dense
from llama_tp.checkpoint.formats.reader import CheckpointReader
from llama_tp.file_kind import is_gguf


def open_checkpoint(
    source: str | Path,
    *,
    model_parallel_size: int | None = None,
    keep_quantized: bool = True,
    dequantized: torch.dtype | None = None,
) -> CheckpointReader:
    """Open a folder with Meta's shards, a Hugging Face model or consolidated.safetensors, or a GGUF file. ValueError
    says what is wrong with it, or what it is instead.

    Of a folder with several forms of a model, Meta's shards are read if there are any, else Hugging Face's files.

    `model_parallel_size`: the required number of shards; None: any. Only Meta's format has them.
    `keep_quantized`: whether quantized layers are read as such, if the format has them in a form of ours.
    `dequantized`: the dtype in which other quantized weights are read; None: the format's default.
    """
    path = Path(source)
    if is_gguf(path):
        _refuse_shards(model_parallel_size, f"{path} is one GGUF file")
        return GGUFReader(path, dequantized, keep_quantized=keep_quantized)
    if is_consolidated(path) and not any(path.glob("consolidated.*.pth")) and not has_weights(path):
        _refuse_shards(model_parallel_size, f"{path} holds {CONSOLIDATED.single}")
        return ConsolidatedReader(path)
    if is_hugging_face(path):
        _refuse_shards(model_parallel_size, f"{path} holds a Hugging Face model")
        reader = HuggingFaceReader(path, dequantized)
        return reader if keep_quantized else dense(reader, dequantized)
    if path.is_file():
        raise ValueError(f"{path} is not a GGUF file; give one, or the folder with a model's weights")
    return FairscaleReader(path, model_parallel_size)


def write_own_tokenizer(reader: CheckpointReader, folder: Path) -> bool:
    """Write the tokenizer that is part of the weights' file into a folder. False if the format has none there.

    ValueError, with the remedy, if it is none that can be written.
    """
    if not isinstance(reader, GGUFReader):
        return False
    write_tokenizer(reader.metadata, folder)
    return True


def _refuse_shards(model_parallel_size: int | None, found: str) -> None:
    if model_parallel_size not in (None, 1):
        raise ValueError(f"model_parallel_size={model_parallel_size}, but {found}; leave it out")
