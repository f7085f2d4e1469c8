"""The sharded checkpoint that is served -> Meta's shards or a Hugging Face model. One plain process, on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llama_tp.checkpoint.formats.quantized import num_bytes
from llama_tp.checkpoint.formats.quantizing import dense
from llama_tp.checkpoint.formats.write import make_writer
from llama_tp.checkpoint.progress import byte_progress
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.staging import StagedFolder, check_space
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.text.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from llama_tp.text.tokenizer import Tokenizer


def export(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    format: str,
    model_parallel_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a converted checkpoint, with its tokenizer, in a foreign format: the same weights, bit by bit. Quantized
    layers are written in the dtype of the others.

    ValueError or OSError, in one line, says what is wrong or cannot be expressed; nothing is left behind then.

    Args:
        checkpoint: folder of a converted checkpoint
        destination: folder to write; it gets a manifest.json too, so `verify` checks it
        format: meta (consolidated.NN.pth and params.json) or hf (safetensors and config.json)
        model_parallel_size: number of Meta's shards; by default as many as the originals had, else 1
        overwrite: replace the destination, if it has a manifest.json
    """
    reader = StoredReader(checkpoint)
    source, staged = reader.folder.resolve(), StagedFolder(destination, overwrite=overwrite)
    if staged.destination.is_relative_to(source) or source.is_relative_to(staged.destination):
        raise ValueError(f"{staged.destination} and the checkpoint {source} are in each other; choose another folder")
    try:
        staged.begin()
        check_space(staged, num_bytes(dense(reader)))
        _write(reader, staged.path, format, model_parallel_size)
        staged.commit()
    finally:
        staged.discard()
    print(f"Wrote {staged.destination}", flush=True)


def _write(reader: StoredReader, folder: Path, kind: str, model_parallel_size: int | None) -> None:
    """All files. ValueError also if any that was read is not that of the checkpoint's manifest."""
    if kind == "meta" and model_parallel_size is None:
        model_parallel_size = reader.about.get("model_parallel_size")
    with reader.reading() as verification:
        plain = dense(reader)
        writer = make_writer(kind, plain, _keep_tokenizer(reader, folder), model_parallel_size)
        with byte_progress("Exporting", num_bytes(plain)) as advance:
            files = writer.write(folder, advance)
        verification.finish()
    write_manifest(folder, known=files, about={"source": "export", "format": kind})


def _keep_tokenizer(reader: StoredReader, folder: Path) -> Tokenizer | None:
    """Copy the files that belong to the checkpoint, and not others that lie in its folder. None if it has none."""
    from llama_tp.text.tokenizer import load_tokenizer  # heavy, and needed by nothing else here

    names = [name for name in TOKENIZER_FILES if name in reader.manifest.files]
    for name in names:
        shutil.copyfile(reader.folder / name, folder / name)
    return load_tokenizer(folder, embedding_rows=reader.args.vocab_size) if names else None
