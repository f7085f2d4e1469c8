"""Verify a checkpoint as a whole: its bytes, its tensors against the architecture, its tokenizer and its values."""

from __future__ import annotations

from pathlib import Path

from llama_tp.checkpoint.store.manifest import load_manifest
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader
from llama_tp.checkpoint.store.table import TABLE
from llama_tp.checkpoint.store.verify import check_hash, verify
from llama_tp.text.tokenizer_files import TOKENIZER_FILES


def verify_checkpoint(folder: str | Path) -> str:
    """What was found to be right, in one line. ValueError, also one line, for the first fault.

    The architecture and the tokenizer are checked first, in milliseconds; then all bytes and values, in one pass. A
    folder that `export` wrote has only its bytes checked.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    found = [f"{len(manifest.files)} files match the manifest"]
    if TABLE in manifest.files:
        reader = StoredReader(folder)
        found += [f"{len(reader.stored.tensors)} tensors have the shapes and dtypes of {MODEL_ARGS} and finite values"]
        found += _check_tokenizer(reader)
    verify(folder)
    return ", ".join(found)


def _check_tokenizer(reader: StoredReader) -> list[str]:
    names = [name for name in TOKENIZER_FILES if name in reader.manifest.files]
    if not names:
        return []
    from llama_tp.text.tokenizer import load_tokenizer  # heavy, and not needed for an error before

    for name in names:  # an error of a damaged file would be misleading
        check_hash(reader.folder / name, reader.manifest.files[name])
    rows = reader.args.vocab_size
    load_tokenizer(reader.folder, embedding_rows=rows)
    return [f"the tokenizer fits the {rows} rows of the embedding"]
