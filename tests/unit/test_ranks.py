"""`--tp`: how many ranks it means, and how they are started."""

from __future__ import annotations

import os
import sys

import pytest

from llama_tp.cli import ranks
from llama_tp.cli.ranks import resolve_size, run_on_ranks
from llama_tp.model_args import ModelArgs
from llama_tp.planning.local import automatic_size


@pytest.fixture
def checkpoint(tmp_path):
    """Enough of one: a model of 4 query heads."""
    ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=100).save(tmp_path / "model_args.json")
    return str(tmp_path)


@pytest.fixture
def started(monkeypatch, no_torchrun):
    """The command line that would replace this process, once."""
    lines = []
    monkeypatch.setattr(os, "execv", lambda program, line: lines.append((program, line)))
    monkeypatch.setattr(sys, "argv", ["/bin/llama-tp", "chat", "somewhere", "--tp", "2"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lines


@pytest.mark.parametrize(
    ("n_heads", "num_gpus", "size"), [(32, 0, 1), (32, 1, 1), (32, 8, 8), (9, 16, 9), (64, 3, 3), (28, 8, 8)]
)
def test_auto_is_a_rank_for_each_gpu_up_to_the_heads_and_one_without_gpus(n_heads, num_gpus, size):
    assert automatic_size(n_heads, num_gpus) == size


def test_auto_counts_gpus_only_if_they_are_used(checkpoint, monkeypatch):
    monkeypatch.setattr(ranks, "_num_gpus", lambda: 8)
    assert resolve_size("auto", checkpoint, "auto") == 4
    assert resolve_size("auto", checkpoint, "cuda") == 4
    assert resolve_size("auto", checkpoint, "cpu") == 1


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (0, "tp=0 must be an integer of at least 1, or auto"),
        (True, "tp=True must be"),
        ("all", "tp='all' must be"),
        (2.5, "tp=2.5 must be"),
        (5, "tensor_parallel_size=5 exceeds n_heads=4"),
    ],
)
def test_a_size_at_which_the_model_cannot_run_is_refused_before_ranks_are_started(checkpoint, started, tp, words):
    with pytest.raises(ValueError, match=words):
        run_on_ranks(tp, checkpoint, "cpu")
    assert not started


def test_one_rank_is_this_process(checkpoint, started):
    for tp in (None, 1, "auto"):
        run_on_ranks(tp, checkpoint, "cpu")
    assert not started


def test_several_ranks_run_the_same_command_under_torchrun(checkpoint, started):
    run_on_ranks(2, checkpoint, "cpu")
    ((program, line),) = started
    assert program == line[0] == sys.executable
    assert line[line.index("--nproc-per-node") + 1] == "2"
    assert line[-6:] == ["-m", "llama_tp", "chat", "somewhere", "--tp", "2"]


def test_a_rank_of_torchrun_runs_the_command_itself(checkpoint, started, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_on_ranks(2, checkpoint, "cpu")
    run_on_ranks("auto", checkpoint, "cpu")
    assert not started
    with pytest.raises(ValueError, match=r"^tp=3, but torchrun has started 2 ranks; leave --tp out$"):
        run_on_ranks(3, checkpoint, "cpu")


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "{}", "Hello"],
        ["chat", "{}"],
        ["bench", "engine", "{}"],
        ["bench", "load", "{}"],
    ],
    ids=" ".join,
)
def test_every_command_that_runs_a_model_takes_it(run, checkpoint, argv):
    code, out, err = run(*(word.format(checkpoint) for word in argv), "--tp=5")
    assert (code, out) == (1, "")
    assert "tensor_parallel_size=5 exceeds n_heads=4" in err


def test_a_server_to_be_measured_gets_one_rank_on_cpus_or_as_many_as_asked(run, checkpoint, monkeypatch):
    from llama_tp.bench import serve

    sizes = []
    monkeypatch.setattr(serve, "bench_serve", lambda setup, *_args, **_options: sizes.append(setup.tp))
    for tp in ("auto", "3"):
        assert run("bench", "serve", checkpoint, "--tokenizer=t", f"--tp={tp}")[0] == 0
    assert sizes == [1, 3]
    assert "tp='all' must be an integer" in run("bench", "serve", checkpoint, "--tp=all")[2]
