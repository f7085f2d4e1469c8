"""`llama-tp bench checkpoint` on few bytes: its table, its JSON and its refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from llama_tp.bench import checkpoint as bench
from llama_tp.bench import checkpoint_steps, peak_memory
from llama_tp.bench.peak_memory import run_measured
from llama_tp.cli.bench import checkpoint as bench_checkpoint
from llama_tp.model_args import ModelArgs

SMALL = ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=4, vocab_size=512)
NAMES = [
    "cp, then sync",
    "convert",
    "export to Hugging Face",
    "convert from Hugging Face",
    "export to 2 shards of Meta",
    "convert from 2 shards of Meta",
    "cat",
    "read into memory",
    "load, not verified",
    "load, verified before",
    "load, every sha256",
    "verify",
    "convert to int8",
]


def test_every_contender_has_a_line_and_nothing_is_left_behind(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "LAYER", SMALL)
    bench_checkpoint(size_gb=0.004, runs=1, folder=str(tmp_path), quantize="int8")
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)["measures"]
    assert [line[:34].rstrip() for line in table[:-2]] == NAMES
    assert all(figures[name]["seconds"] > 0 for name in NAMES)
    assert figures["read into memory"]["ratio"] == figures["cp, then sync"]["ratio"] == 1
    assert all((figures[name]["peak_bytes"] is None) == (name in ("cat", "cp, then sync")) for name in NAMES)
    assert list(tmp_path.iterdir()) == []


MB = 1_000_000
BLOCKS = 160 * MB
"""Two blocks of rows, and what the threads read with."""


def test_the_memory_of_every_step_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path):
    """The model is larger than the bound. Measured from outside, in processes like those of the command line."""
    args = ModelArgs(dim=1024, n_layers=10, n_heads=16, n_kv_heads=16, vocab_size=8192, ffn_hidden_dim=4096)
    originals, converted, hf, shards = (tmp_path / name for name in ("originals", "converted", "hf", "shards"))
    bench._write_originals(args, originals)
    largest = 2 * args.vocab_size * args.dim
    bound = 2 * largest + BLOCKS
    assert bench._num_bytes(args) > 1.5 * bound

    def peak(name, *arguments):
        done = run_measured([sys.executable, "-m", "llama_tp.bench.checkpoint_steps", name, *arguments])
        return done.peak_bytes

    start = peak("nothing")
    steps = [
        ("convert", originals, converted),
        ("export", converted, hf, "hf"),
        ("export", converted, shards, "meta", "1"),
        ("convert", hf, tmp_path / "from_hf"),
    ]
    peaks = {" ".join(map(str, step)): peak(*step) - start for step in steps}
    assert {step: found // MB for step, found in peaks.items() if found > bound} == {}


def test_memory_that_a_process_holds_for_a_moment_is_seen(tmp_path, monkeypatch):
    """Allocated and touched, not mapped from a file. The moment lasts until a sample has been taken."""
    held, seen, allocated = tmp_path / "held", tmp_path / "seen", peak_memory._allocated

    def sample(pid):
        is_held = held.exists()
        found = allocated(pid)
        if is_held:
            seen.touch()
        return found

    monkeypatch.setattr(peak_memory, "_allocated", sample)
    waiting = f"pathlib.Path({str(held)!r}).touch()\nwhile not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.01)"
    program = f"import mmap, pathlib, time; {{}}; {waiting}"
    file = tmp_path / "file"
    file.write_bytes(bytes(80 * MB))
    reading = f"f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])"

    def peak(statement):
        for path in (held, seen):
            path.unlink(missing_ok=True)
        return run_measured([sys.executable, "-c", program.format(statement)]).peak_bytes

    start = peak("pass")
    assert 75 * MB < peak(f"a = b'x' * {40 * MB}; b = bytearray(a)") - start < 90 * MB
    assert peak(reading) - start < 10 * MB


def test_a_step_that_fails_is_reported_with_its_reason():
    with pytest.raises(RuntimeError, match="exited with 1: ValueError: no"):
        run_measured([sys.executable, "-c", "raise ValueError('no')"])


def test_ranks_read_no_more_than_the_file_holds_where_its_chunks_are_cut(tmp_path):
    """But for the norms, which all of them read, and copies of kv heads."""
    args = replace(SMALL, n_kv_heads=8, n_layers=2)
    bench._write_originals(args, tmp_path / "originals")
    checkpoint_steps.convert(str(tmp_path / "originals"), str(tmp_path / "converted"))
    shares = {size: bench._bytes_read(tmp_path / "converted", args, size) for size in (1, 2, 3, 4, 8)}
    assert shares.pop(1) == 1
    assert all(1 < share < 1.05 for share in shares.values())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"size_gb": 0}, "size_gb=0 must be"),
        ({"runs": 0}, "runs=0 must be"),
        ({"quantize": "int3"}, "quantize='int3' must be one of int8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(setting, words):
    with pytest.raises(ValueError, match=words):
        bench_checkpoint(**setting)
