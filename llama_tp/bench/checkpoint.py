"""`llama-tp bench checkpoint`: how fast weights are converted and loaded, next to copying and reading their bytes."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

import torch

from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.formats.write import make_writer
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.progress import no_progress
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.reading import StoredFiles
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from llama_tp.parallel.sharding import num_parameters_of_rank, shard, tp_dim

LAYER = ModelArgs(dim=2048, n_layers=1, n_heads=32, n_kv_heads=8, vocab_size=32000, ffn_hidden_dim=5632)
"""The shape of the layers: TinyLlama 1.1B's, with twice its kv heads."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the table."""

    name: str
    seconds: float
    gb_per_s: float
    ratio: float
    """To what it is compared with, copying or reading; 1 for those two."""


def bench_checkpoint(folder: str | None, *, size_gb: float, runs: int) -> None:
    """Implements `llama-tp bench checkpoint`."""
    if isinstance(size_gb, bool) or not isinstance(size_gb, (int, float)) or size_gb <= 0:
        raise ValueError(f"size_gb={size_gb!r} must be a number above 0")
    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    args = _sized(size_gb)
    with tempfile.TemporaryDirectory(dir=folder, prefix="llama_tp.bench.") as name:
        work = Path(name)
        _write_originals(args, work / "originals")
        measures = _measure(work, args, runs)
        shares = {size: _bytes_read(work / "converted", args, size) for size in (1, 2, 3, 4, 8)}
    for one in measures:
        print(f"{one.name:<34}{one.seconds:>8.2f} s{one.gb_per_s:>8.2f} GB/s{one.ratio:>8.2f}x")
    print("bytes read by all ranks, to the file size: " + ", ".join(f"TP {n}: {one:.3f}" for n, one in shares.items()))
    figures = {one.name: [one.seconds, one.gb_per_s, one.ratio] for one in measures}
    print(json.dumps({"size_gb": round(_num_bytes(args) / 1e9, 2), "runs": runs, **figures, "bytes_read": shares}))


def _sized(size_gb: float) -> ModelArgs:
    """As many layers as the size allows, at least one."""
    fixed = 2 * num_parameters_of_rank(replace(LAYER, n_layers=1), 1, 0)
    layer = 2 * num_parameters_of_rank(replace(LAYER, n_layers=2), 1, 0) - fixed
    return replace(LAYER, n_layers=1 + max(0, int((size_gb * 1e9 - fixed) / layer)))


def _num_bytes(args: ModelArgs) -> int:
    return 2 * num_parameters_of_rank(args, 1, 0)


def _write_originals(args: ModelArgs, folder: Path) -> None:
    """Random weights in Meta's files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in weight_shapes(args).items()
    }
    make_writer("meta", MemoryReader.of(args, weights), None, 1).write(folder, no_progress)


def _measure(work: Path, args: ModelArgs, runs: int) -> list[Measure]:
    """Medians; the contenders take turns. All of them find the files that they read in the page cache."""
    originals, converted = work / "originals", work / "converted"

    def load(verify_files: str) -> Callable[[], object]:
        return lambda: load_model(str(converted), args, join("cpu"), torch.bfloat16, verify_files=verify_files)

    contenders: dict[str, Callable[[], object]] = {
        "cp, then sync": lambda: _copy(originals, work / "copy"),
        "convert": lambda: _convert(originals, converted),
        "cat": lambda: subprocess.run(["cat", *converted.glob("*.distcp")], stdout=subprocess.DEVNULL, check=True),
        "load, not verified": load("size"),
        "load, verified before": load("once"),
        "load, every sha256": load("always"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, contender in contenders.items():
            if name == "load, verified before":
                sleep(2.5)  # a file that has just been written is not remembered as verified
                contender()
            start = perf_counter()
            contender()
            seconds[name].append(perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    size = _num_bytes(args) / 1e9
    return [
        Measure(name, median, size / median, medians[_COMPARED_WITH.get(name, "cat")] / median)
        for name, median in medians.items()
    ]


_COMPARED_WITH = {"cp, then sync": "cp, then sync", "convert": "cp, then sync"}


def _copy(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *destination.iterdir()], check=True)


def _convert(originals: Path, destination: Path) -> None:
    """A conversion without what takes no time: tokenizer, staging folder."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir()
    reader = open_checkpoint(originals)
    files = dcp.save(reader, destination)
    reader.args.save(destination / "model_args.json")
    write_manifest(destination, known=files, about=reader.about)


def _bytes_read(folder: Path, args: ModelArgs, size: int) -> float:
    """Bytes that all ranks of `size` read together, as a share of the stored bytes."""
    table = StoredFiles(folder).tensors
    total = sum(tensor.chunk_bytes(chunk) for tensor in table.values() for chunk in tensor.chunks)
    read = 0
    for rank in range(size):
        for name, tensor in table.items():
            parts = [range(tensor.shape[0])]
            if tp_dim(name) is not None:
                parts = [entries for _, entries in shard(args, name, size, rank).parts]
            for chunk in tensor.chunks:
                if any(one.start < chunk.start + chunk.length and chunk.start < one.stop for one in parts):
                    read += tensor.chunk_bytes(chunk)
    return read / total
