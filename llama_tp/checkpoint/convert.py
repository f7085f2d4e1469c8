"""Converts a foreign checkpoint to the sharded one for serving. On CPUs, on any number of ranks or without torchrun."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from llama_tp.checkpoint.formats.cast import in_one_dtype, name_of, parse_dtype
from llama_tp.checkpoint.formats.checklist import BackgroundCheck, check_original
from llama_tp.checkpoint.formats.open import open_checkpoint, write_own_tokenizer
from llama_tp.checkpoint.formats.quantized import num_bytes
from llama_tp.checkpoint.formats.quantizing import quantizing
from llama_tp.checkpoint.formats.reader import CheckpointReader
from llama_tp.checkpoint.progress import byte_progress
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.chunks import DEFAULT_TP_MAX
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.staging import StagedFolder, check_space, replace_file
from llama_tp.checkpoint.store.stored import MODEL_ARGS
from llama_tp.model.weights import QUANTIZATIONS
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree, gather
from llama_tp.parallel.launch import meet
from llama_tp.text.tokenizer_files import check_links, copy_tokenizer

_PEER_TIMEOUT = timedelta(hours=12)
"""A rank that has written its share waits for the slowest one. A dead rank is noticed immediately."""


def convert(
    original_ckpt_dir: str,
    tokenizer_path: str | None = None,
    model_parallel_size: int | None = None,
    save_checkpoint_dir: str = "converted_checkpoints",
    max_seq_len: int = 2048,
    max_batch_size: int = 32,
    model_args_path: str = "./model_args.json",
    tp_max: int = DEFAULT_TP_MAX,
    dtype: str | None = None,
    quantize: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert original weights, and write model_args.json into the checkpoint and to `model_args_path`.

    Under torchrun each rank writes its share. The result loads at any tensor-parallel size. If any rank fails:
    ValueError (or OSError) on all, and nothing is left behind.

    Args:
        original_ckpt_dir: folder with params.json and consolidated.00.pth and so on, or consolidated.safetensors;
            folder of a Hugging Face model (config.json and safetensors); or a GGUF file
        tokenizer_path: the model's tokenizer.model or tokenizer.json; copied into the checkpoint with its companions.
            None: the one in original_ckpt_dir
        model_parallel_size: shards of the originals: Llama 2 7B 1, 13B 2, 70B 8; None: any number
        save_checkpoint_dir: folder to write
        max_seq_len: default context for serving, stored in model_args.json
        max_batch_size: default number of concurrent sequences, likewise
        model_args_path: file for a second copy of model_args.json
        tp_max: tensor-parallel size up to which each rank reads only its own bytes; larger groups work, too
        dtype: bfloat16, float16 or float32, to which weights that are not quantized are rounded; None: that of the
            originals
        quantize: int8 or int4, to quantize the linear layers; none, to store no layer quantized; None: as in the
            originals
        workers: threads of each rank that read, quantize, hash and write; None: as many as cores, up to 4
        overwrite: replace what is in save_checkpoint_dir
    """
    if isinstance(tp_max, bool) or not isinstance(tp_max, int) or tp_max < 1:
        raise ValueError(f"tp_max={tp_max!r} must be an integer of at least 1")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers={workers!r} must be an integer of at least 1")
    if quantize not in (None, "none", *QUANTIZATIONS):
        raise ValueError(f"quantize={quantize!r} must be one of {', '.join(QUANTIZATIONS)}, none; or left out")
    target = parse_dtype(dtype)
    with process_group(), TemporaryDirectory() as own_tokenizer:
        staged = StagedFolder(str(save_checkpoint_dir), overwrite=overwrite)
        try:
            original = agree(lambda: _open(str(original_ckpt_dir), model_parallel_size, target, quantize))
            reader = agree(lambda: in_one_dtype(_quantized(original, quantize), target))
            tokenizer = agree(lambda: _check_tokenizer(original, str(original_ckpt_dir), tokenizer_path, own_tokenizer))
            args = agree(lambda: replace(reader.args, max_seq_len=max_seq_len, max_batch_size=max_batch_size))
            agree(lambda: _begin(staged, reader, str(model_args_path)))
            with agree(lambda: BackgroundCheck(_share_of_rank(reader.expected_md5s))) as check:
                _write(reader, args, staged, tokenizer, tp_max, workers)
                agree(lambda: check.finish(show_progress=is_leader()))
            agree(lambda: _finish(staged, args, str(model_args_path)))
            if is_leader():
                is_checked = reader.expected_md5s.keys() == set(reader.files)
                checked = "; the originals match checklist.chk" if is_checked else ""
                print(f"Wrote {staged.destination} and {model_args_path}{checked}", flush=True)
        finally:
            if is_leader():
                staged.discard()
            _wait_for_all()


def _open(
    original_ckpt_dir: str, model_parallel_size: int | None, dtype: torch.dtype | None, quantize: str | None
) -> CheckpointReader:
    if isinstance(model_parallel_size, bool) or not isinstance(model_parallel_size, int | None):
        raise ValueError(f"model_parallel_size={model_parallel_size!r} must be an integer")
    dequantized = None if dtype is None else torch.float32  # rounded once, to `dtype`
    return open_checkpoint(
        original_ckpt_dir,
        model_parallel_size=model_parallel_size,
        keep_quantized=quantize != "none",
        dequantized=dequantized,
    )


def _quantized(reader: CheckpointReader, quantize: str | None) -> CheckpointReader:
    return reader if quantize in (None, "none") else quantizing(reader, str(quantize))


def _check_tokenizer(reader: CheckpointReader, original_ckpt_dir: str, tokenizer_path: str | None, own: str) -> str:
    """The path of a tokenizer that fits the weights. `own`: a folder to write one to that is part of them."""
    from llama_tp.text.tokenizer import load_tokenizer  # a heavy import, needed only here

    if tokenizer_path is None:
        tokenizer_path = own if write_own_tokenizer(reader, Path(own)) else original_ckpt_dir
    tokenizer_path = str(tokenizer_path)
    for path in (Path(tokenizer_path), Path(tokenizer_path, "tokenizer.model")):
        check_original(path)
    check_links(tokenizer_path)
    load_tokenizer(tokenizer_path, embedding_rows=reader.args.vocab_size)
    return tokenizer_path


def _begin(staged: StagedFolder, reader: CheckpointReader, model_args_path: str) -> None:
    if not is_leader():
        return
    parent = Path(model_args_path).resolve().parent
    if parent != staged.destination and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"model_args_path={model_args_path}: the folder {parent} does not exist or is not writable")
    staged.begin()
    check_space(staged, num_bytes(reader))


def _write(
    reader: CheckpointReader,
    args: ModelArgs,
    staged: StagedFolder,
    tokenizer_path: str,
    tp_max: int,
    workers: int | None,
) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with byte_progress("Converting", num_bytes(reader) // ranks, enabled=is_leader()) as advance:
        files = dcp.save(reader, staged.path, tp_max=tp_max, workers=workers, advance=advance)
    about = {**reader.about, "dtype": name_of(reader.dtype)}
    if reader.quantized:
        about["quantized_layers"] = dict(Counter(source.form for source in reader.quantized.values()))

    def describe() -> None:
        if is_leader():
            args.save(staged.path / MODEL_ARGS)
            copy_tokenizer(tokenizer_path, staged.path)
            write_manifest(staged.path, known=files, about=about)

    agree(describe)


def _finish(staged: StagedFolder, args: ModelArgs, model_args_path: str) -> None:
    if not is_leader():
        return
    staged.commit()
    if Path(model_args_path).resolve() != staged.destination / MODEL_ARGS:
        replace_file(Path(model_args_path), json.dumps(args.to_dict(), indent=2) + "\n")


def _share_of_rank(expected_md5s: Mapping[Path, frozenset[str]]) -> dict[Path, frozenset[str]]:
    """The files that this rank compares with the checklist; each is checked by one rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return {path: expected_md5s[path] for path in list(expected_md5s)[rank::ranks]}


def _wait_for_all() -> None:
    """Let the leader clean up before any rank exits: torchrun ends all ranks as soon as one has ended."""
    with suppress(ValueError):
        gather(None)


def is_leader() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """gloo over the ranks that torchrun started; none in a plain process. The caller's, if there is one already."""
    if dist.is_initialized():
        yield
        return
    meet(timeout=_PEER_TIMEOUT)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
