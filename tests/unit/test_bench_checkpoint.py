"""`llama-tp bench checkpoint` on few bytes: its table, its JSON and its refusals."""

from __future__ import annotations

import json

import pytest

from llama_tp.bench import checkpoint as bench
from llama_tp.cli.bench import checkpoint as bench_checkpoint
from llama_tp.model_args import ModelArgs


def test_every_contender_has_a_line_and_nothing_is_left_behind(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "LAYER", ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=4, vocab_size=512))
    bench_checkpoint(size_gb=0.004, runs=1, folder=str(tmp_path))
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    names = ["cp, then sync", "convert", "cat", "load, not verified", "load, verified before", "load, every sha256"]
    assert [line[:34].rstrip() for line in table[:-1]] == names
    assert all(figures[name][0] > 0 for name in names)
    assert figures["cat"][2] == figures["cp, then sync"][2] == 1
    assert list(tmp_path.iterdir()) == []


def test_ranks_read_no_more_than_the_file_holds_where_its_chunks_are_cut(monkeypatch, capsys, tmp_path):
    """But for the norms, which all of them read, and copies of kv heads."""
    monkeypatch.setattr(bench, "LAYER", ModelArgs(dim=256, n_layers=1, n_heads=8, n_kv_heads=8, vocab_size=512))
    bench_checkpoint(size_gb=0.004, runs=1, folder=str(tmp_path))
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])["bytes_read"]
    assert shares["1"] == 1
    assert all(1 < share < 1.05 for size, share in shares.items() if size != "1")


@pytest.mark.parametrize(("setting", "words"), [({"size_gb": 0}, "size_gb=0 must be"), ({"runs": 0}, "runs=0 must be")])
def test_what_cannot_be_measured_is_refused_by_name(setting, words):
    with pytest.raises(ValueError, match=words):
        bench_checkpoint(**setting)
