"""`llama-tp bench micro`: its table, its JSON, and that what it calls a rate is one."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from llama_tp.bench import ceilings
from llama_tp.bench import micro as bench
from llama_tp.bench.ceilings import linear_rates, linear_shapes, read_bandwidth, seconds_of
from llama_tp.bench.machine import _cpu_cache
from llama_tp.cli.bench import micro
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.linear import Linear
from llama_tp.model_args import ModelArgs
from tests.tiny_model import MODELS, engine_of, random_model

CPU = torch.device("cpu")
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=160, ffn_hidden_dim=96)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Rates of almost nothing, measured once."""
    monkeypatch.setattr(ceilings, "_LEAST_S", 0.0)
    monkeypatch.setattr(ceilings, "_LEAST_CALLS", 1)
    monkeypatch.setattr(ceilings, "_READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_GEMM_SIZES", {"cpu": ((8, 64),)})
    monkeypatch.setattr(ceilings, "last_level_cache", lambda _device: 1 << 16)


def test_every_layer_has_a_rate_in_every_format_that_has_a_kernel(tmp_path, capsys):
    ARGS.save(tmp_path / "model_args.json")
    micro(model=str(tmp_path / "model_args.json"), dtype="bfloat16", threads=1, rows=(1, 16), forms="dense,int8,int4")
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["benchmark"] == "micro"
    assert document["read_bytes_per_s"] > 0
    assert document["flops"] > 0
    found = [(one["layer"], one["form"], one["kernels"], one["rows"]) for one in document["linear"]]
    layers = ("wqkv", "wo", "w13", "w2", "output")
    assert found == list(product(layers, ("dense", "int8", "int4"), ("PyTorch", "compiled"), (1, 16)))
    assert len(lines) == 6 + len(layers) * 3 * 2


def test_without_compiled_kernels_it_is_said_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "build_kernels", lambda: SimpleNamespace(wait=lambda: None, error="it is Thursday"))
    ARGS.save(tmp_path / "model_args.json")
    micro(model=str(tmp_path / "model_args.json"), dtype="bfloat16", threads=1, rows=1, forms="int4")
    *_, note, last = capsys.readouterr().out.splitlines()
    assert {one["kernels"] for one in json.loads(last)["linear"]} == {"PyTorch"}
    assert note == "Note: no compiled kernels are measured: it is Thursday"


def test_compiled_kernels_are_measured_in_the_formats_and_for_the_rows_of_the_engine(monkeypatch):
    products = []
    monkeypatch.setattr(ceilings, "seconds_of", lambda function, _device: products.append(function()[0]) or 1.0)
    path = build_kernels().wait()
    assert path is not None
    kernels = Kernels(path, 1)
    rates = linear_rates({"wo": (64, 64)}, list(ceilings.FORMATS), [4, 65], CPU, torch.bfloat16, kernels)
    compiled = [(rate, y) for rate, y in zip(rates, products, strict=True) if rate.kernels == "compiled"]
    assert [(rate.form, rate.rows) for rate, _ in compiled] == [
        (form, 4) for form in ("dense", "int8", "int8_groups", "int4")
    ]
    assert all(y.shape == (4, 64) and y.isfinite().all() and y.std() > 0 for _, y in compiled)


def test_formats_that_are_widened_at_load_have_no_rate_of_their_own():
    rates = linear_rates({"wo": (64, 64)}, ["dense", "int8", "int4"], [1], CPU, torch.float32)
    assert [rate.form for rate in rates] == ["dense"]


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_the_shapes_are_those_of_the_layers_that_the_engine_computes_with(name):
    model = engine_of(random_model(MODELS[name])).runner.model
    layers = [(one.out_features, one.in_features) for one in model.modules() if isinstance(one, Linear)]
    of_layer = list(linear_shapes(MODELS[name]).values())
    assert sorted(layers) == sorted([*of_layer[:-1] * MODELS[name].n_layers, of_layer[-1]])


def test_a_bandwidth_counts_every_byte_that_is_read(monkeypatch):
    """With calls that take a second each."""
    seen = []
    monkeypatch.setattr(ceilings, "seconds_of", lambda function, _device: seen.append(function().numel()) or 1.0)
    assert read_bandwidth(CPU) == 1 << 20
    assert len(seen) == 2


def test_the_time_of_a_call_is_the_best_one(monkeypatch):
    times = iter([0, 9, 9, 12, 12, 14, 14, 19])  # to warm up: 9, then 3, 2 and 5
    monkeypatch.setattr(ceilings, "_LEAST_CALLS", 3)
    monkeypatch.setattr(ceilings, "perf_counter", lambda: next(times))
    assert seconds_of(lambda: None, CPU) == 2


def test_the_last_level_caches_of_all_cores_are_added_once_each(tmp_path):
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, (level, size) in enumerate(((1, "48K"), (3, "32M"))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    assert _cpu_cache(tmp_path, [0, 1, 2]) == 64 << 20
    assert _cpu_cache(tmp_path, [1]) == 32 << 20
    assert _cpu_cache(tmp_path / "nowhere", [0]) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forms": "int3"}, "forms=int3 must be some of dense, int8, int8_groups, int4"),
        ({"rows": (1, 0)}, "rows=1,0 must be integers of at least 1"),
        ({"model": "llama2-8b"}, "model='llama2-8b' is not a published model"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        micro(**{"model": "smollm2-135m", **settings})
