"""What a checkpoint of any format is, by its headers: nothing reads the bytes of the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.cast import name_of
from llama_tp.checkpoint.formats.checklist import expected_md5s
from llama_tp.checkpoint.formats.open import is_consolidated, open_checkpoint
from llama_tp.checkpoint.formats.quantized import formats_of_reader
from llama_tp.checkpoint.formats.reader import CheckpointReader
from llama_tp.checkpoint.store.stored import StoredReader, is_stored
from llama_tp.model.weights import WeightFormats, weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.text.chat import chat_format
from llama_tp.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is known without reading the weights."""

    path: str
    format: str
    args: ModelArgs
    dtype: str
    """Of the embedding as it is read."""
    quantized: dict[str, int]
    """Linear layers of each form."""
    formats: WeightFormats
    """Of these layers."""
    parameters: int
    tensors: int
    files: int
    """How many hold weights."""
    num_bytes: int
    """Of those files."""
    tokenizer: str | None
    """Its kind."""
    tokens: int | None
    """Of the vocabulary."""
    chat_format: str | None
    features: tuple[str, ...]
    """What not every Llama has."""
    notes: tuple[str, ...]
    """What is odd, or missing."""


def open_any(path: str | Path) -> CheckpointReader:
    """Open a converted checkpoint, or one of any other format."""
    return StoredReader(path) if is_stored(path) else open_checkpoint(path)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Meta's shards, a Hugging Face model, consolidated.safetensors, a GGUF file or a converted checkpoint. ValueError,
    in one line, for what is none or has damaged headers."""
    reader = open_any(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    tokenizer, chat, problems = _text(folder, reader.args.vocab_size)
    notes = [*problems, *_notes(folder, reader, tokenizer)]
    return Inspection(
        path=str(path),
        format=_format(reader),
        args=reader.args,
        dtype=name_of(reader.dtype),
        quantized=dict(Counter(source.form for source in reader.quantized.values())),
        formats=formats_of_reader(reader),
        parameters=sum(math.prod(shape) for shape in weight_shapes(reader.args).values()),
        tensors=len(reader.tensors) + len(reader.quantized),
        files=len(reader.files),
        num_bytes=sum(file.stat().st_size for file in reader.files),
        tokenizer=tokenizer.kind if tokenizer else None,
        tokens=tokenizer.vocab_size if tokenizer else None,
        chat_format=chat,
        features=tuple(_features(reader.args)),
        notes=tuple(notes),
    )


def _format(reader: CheckpointReader) -> str:
    source = _source(reader.about)
    return f"converted checkpoint, from {source}" if isinstance(reader, StoredReader) else source


def _source(about: Mapping[str, Any]) -> str:
    if about.get("source") == "fairscale":
        count = about.get("model_parallel_size")
        return f"Meta's shards ({count})"
    if about.get("source") == "huggingface":
        return f"Hugging Face's safetensors ({about.get('architecture')})"
    if about.get("source") == "consolidated":
        return "Mistral AI's consolidated.safetensors"
    return "a GGUF file" if about.get("source") == "gguf" else str(about.get("source"))


def _features(args: ModelArgs) -> Iterator[str]:
    if args.tied_embeddings:
        yield "tied embeddings"
    biased = {"q, k and v": args.qkv_bias, "the attention's output": args.wo_bias, "the feed-forward": args.ffn_bias}
    if any(biased.values()):
        yield f"biases on {', '.join(name for name, is_there in biased.items() if is_there)}"
    if args.qk_norm:
        yield "norms of q and k"
    if args.head_dim * args.n_heads != args.dim:
        yield f"heads of {args.head_dim}, not dim / n_heads"
    if args.rope_scaling is not None:
        yield f"{args.rope_scaling.kind} rope scaling by {args.rope_scaling.factor:g}"


def _text(folder: Path, rows: int) -> tuple[Tokenizer | None, str | None, list[str]]:
    """The tokenizer, the chat format and its origin, and why there is none."""
    try:
        tokenizer = load_tokenizer(folder, embedding_rows=rows)
    except (OSError, ValueError) as error:
        return None, None, [f"no tokenizer: {error}"]
    try:
        chat = chat_format("auto", tokenizer)
    except ValueError as error:
        return tokenizer, None, [f"no chat format: {error}"]
    return tokenizer, f"{chat.name} ({chat.origin})" if chat.origin else chat.name, []


def _notes(folder: Path, reader: CheckpointReader, tokenizer: Tokenizer | None) -> Iterator[str]:
    args = reader.args
    if args.context_limit is not None:
        yield (
            f"served up to {args.context_limit} tokens: behind that a sliding window begins, or rotary frequencies "
            "change with the length, which is not computed"
        )
    if tokenizer is not None:
        if not tokenizer.chat_template:
            yield "no chat template"
        if tokenizer.vocab_size < args.vocab_size:
            yield f"the embedding has {args.vocab_size - tokenizer.vocab_size} rows more than the vocabulary has tokens"
        if beyond := tokenizer.beyond_embedding:
            yield f"added tokens without an embedding, which stay text: {', '.join(sorted(beyond)[:4])}"
    others = {source.dtype for source in reader.tensors.values()} - {reader.dtype}
    if others:
        names = ", ".join(sorted(map(name_of, others)))
        yield f"some tensors are {names}: pass --dtype to `llama-tp convert`, which writes all in one dtype"
    source = reader.about.get("source")
    if source == "fairscale" and not isinstance(reader, StoredReader):
        unlisted = [file.name for file in reader.files if file not in reader.expected_md5s]
        if not expected_md5s(folder):
            yield "no checklist.chk: damaged shards cannot be told from sound ones"
        elif unlisted:
            yield f"checklist.chk does not list {unlisted[0]}"
    if source == "huggingface" and is_consolidated(folder):
        yield "consolidated.safetensors, which is here as well, is not read"
    if widened := reader.about.get("widened_tensors"):
        become = "became" if isinstance(reader, StoredReader) else "become"
        yield f"quantized tensors that {become} {name_of(reader.dtype)}: {widened}"
