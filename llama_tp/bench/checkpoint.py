"""`llama-tp bench checkpoint`: how fast weights are converted, exported and loaded, and in how much memory."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

import torch

from llama_tp.bench.peak_memory import run_measured
from llama_tp.bench.report import finish
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.formats.write import make_writer
from llama_tp.checkpoint.progress import no_progress
from llama_tp.checkpoint.store.reading import StoredFiles
from llama_tp.model.weights import QUANTIZATIONS, weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import num_parameters_of_rank, shard, tp_dim

LAYER = ModelArgs(dim=2048, n_layers=1, n_heads=32, n_kv_heads=8, vocab_size=32000, ffn_hidden_dim=5632)
"""The shape of the layers: TinyLlama 1.1B's, with twice its kv heads."""


COPY, CAT, READ = "cp, then sync", "cat", "read into memory"
"""What the others are compared with."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run of a contender took."""

    seconds: float
    peak_bytes: int | None = None
    """Memory allocated by its process; None: not measured."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of the table."""

    name: str
    run: Callable[[], Taken]
    compared_with: str


@dataclass(frozen=True, slots=True)
class Measure:
    """What the runs of one contender took."""

    seconds: float
    """Median."""
    gb_per_s: float
    ratio: float
    """To the speed of what it is compared with."""
    peak_bytes: int | None
    """The largest."""


def bench_checkpoint(
    folder: str | None, *, size_gb: float, runs: int, quantize: str | None = None, plot: str | None = None
) -> None:
    """Implements `llama-tp bench checkpoint`."""
    if isinstance(size_gb, bool) or not isinstance(size_gb, (int, float)) or size_gb <= 0:
        raise ValueError(f"size_gb={size_gb!r} must be a number above 0")
    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize={quantize!r} must be one of {', '.join(QUANTIZATIONS)}; or left out")
    args = _sized(size_gb)
    with tempfile.TemporaryDirectory(dir=folder, prefix="llama_tp.bench.") as name:
        work = Path(name)
        _write_originals(args, work / "originals")
        measures = _measure(_contenders(work, quantize), _num_bytes(args) / 1e9, runs)
        shares = {size: _bytes_read(work / "converted", args, size) for size in (1, 2, 3, 4, 8)}
    _report(measures, shares, args, runs, plot)


def _report(
    measures: dict[str, Measure], shares: dict[int, float], args: ModelArgs, runs: int, plot: str | None
) -> None:
    for name, one in measures.items():
        peak = "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:>8.0f} MB"
        print(f"{name:<34}{one.seconds:>8.2f} s{one.gb_per_s:>8.2f} GB/s{one.ratio:>8.2f}x{peak}".rstrip())
    largest = 2 * max(math.prod(shape) for shape in weight_shapes(args).values())
    size = round(_num_bytes(args) / 1e9, 2)
    print(f"peaks are of allocated memory, mapped files excluded; the largest of {size} GB is {largest / 1e6:.0f} MB")
    print("bytes read by all ranks, to the file size: " + ", ".join(f"TP {n}: {one:.3f}" for n, one in shares.items()))
    figures = {name: asdict(one) for name, one in measures.items()}
    document = {"size_gb": size, "largest_tensor": largest, "runs": runs, "measures": figures, "bytes_read": shares}
    finish("checkpoint", document, plot)


def _sized(size_gb: float) -> ModelArgs:
    """As many layers as the size takes, at least one."""
    fixed = 2 * num_parameters_of_rank(replace(LAYER, n_layers=1), 1, 0)
    layer = 2 * num_parameters_of_rank(replace(LAYER, n_layers=2), 1, 0) - fixed
    return replace(LAYER, n_layers=1 + max(0, math.ceil((size_gb * 1e9 - fixed) / layer)))


def _num_bytes(args: ModelArgs) -> int:
    return 2 * num_parameters_of_rank(args, 1, 0)


def _write_originals(args: ModelArgs, folder: Path) -> None:
    """Meta's files of random weights, the same ones in every tensor: no speed depends on the values."""
    folder.mkdir()
    shapes = weight_shapes(args)
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(max(math.prod(shape) for shape in shapes.values()), dtype=torch.bfloat16)
    values.normal_(0, 0.02, generator=generator)
    weights = {name: values[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    make_writer("meta", MemoryReader.of(args, weights), None, 1).write(folder, no_progress)


def _contenders(work: Path, quantize: str | None) -> list[Contender]:
    """In an order in which each finds what it reads."""
    originals, converted, hf, shards = work / "originals", work / "converted", work / "hf", work / "shards"

    def convert(source: Path, destination: Path, *options: str) -> Callable[[], Taken]:
        return lambda: _step("convert", source, destination, *options)

    def load(verify_files: str) -> Callable[[], Taken]:
        return lambda: _step("load", converted, verify_files)

    contenders = [
        Contender(COPY, lambda: _copy(originals, work / "copy"), COPY),
        Contender("convert", convert(originals, converted), COPY),
        Contender("export to Hugging Face", lambda: _step("export", converted, hf, "hf"), COPY),
        Contender("convert from Hugging Face", convert(hf, work / "copy"), COPY),
        Contender("export to 2 shards of Meta", lambda: _step("export", converted, shards, "meta", "2"), COPY),
        Contender("convert from 2 shards of Meta", convert(shards, work / "copy"), COPY),
        Contender(CAT, lambda: _cat(converted), READ),
        Contender(READ, lambda: _step("read", converted), READ),
        Contender("load, not verified", load("size"), READ),
        Contender("load, verified before", load("once"), READ),
        Contender("load, every sha256", load("always"), READ),
        Contender("verify", lambda: _step("verify", converted), READ),
    ]
    if quantize is not None:
        contenders.append(Contender(f"convert to {quantize}", convert(originals, work / "copy", quantize), COPY))
    return contenders


def _measure(contenders: list[Contender], size_gb: float, runs: int) -> dict[str, Measure]:
    """The contenders take turns. All of them find the files that they read in the page cache, if it can hold them."""
    taken: dict[str, list[Taken]] = {one.name: [] for one in contenders}
    for _ in range(runs):
        for one in contenders:
            if one.name == "load, verified before":
                sleep(2.5)  # a file that has just been written is not remembered as verified
                one.run()
            taken[one.name].append(one.run())
    medians = {name: statistics.median(run.seconds for run in each) for name, each in taken.items()}
    measures = {}
    for one in contenders:
        median = medians[one.name]
        peaks = [run.peak_bytes for run in taken[one.name] if run.peak_bytes is not None]
        ratio = medians[one.compared_with] / median
        measures[one.name] = Measure(median, size_gb / median, ratio, max(peaks, default=None))
    return measures


def _step(name: str, source: Path, *arguments: str | Path) -> Taken:
    """A step in a fresh process. What it wrote before is removed first."""
    if arguments and isinstance(arguments[0], Path):
        shutil.rmtree(arguments[0], ignore_errors=True)
    done = run_measured([sys.executable, "-m", "llama_tp.bench.checkpoint_steps", name, source, *arguments])
    return Taken(float(done.output), done.peak_bytes or None)


def _cat(folder: Path) -> Taken:
    """The page cache alone: what cat reads never reaches the memory of a process."""
    start = perf_counter()
    subprocess.run(["cat", *folder.glob("*.distcp")], stdout=subprocess.DEVNULL, check=True)
    return Taken(perf_counter() - start)


def _copy(source: Path, destination: Path) -> Taken:
    shutil.rmtree(destination, ignore_errors=True)
    start = perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *destination.iterdir()], check=True)
    return Taken(perf_counter() - start)


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
