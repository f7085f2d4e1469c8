"""`--plot`: every benchmark's document becomes a figure that says what it shows, in which unit."""

from __future__ import annotations

import json

import pytest

from llama_tp.bench import report
from llama_tp.bench.report import check_plot, finish
from tests.optional import imported

LATENCIES = {f"{kind}_{name}_ms": 3.0 for kind in ("median", "p99") for name in ("ttft", "tpot", "itl")}
SERVED = {"output_throughput": 50.0, **LATENCIES}
ARRIVING = {"requests": 9, "rate": 2.0, "concurrency": 4}
MACHINE = {"model": "tiny", "device": "CPU", "threads": 2, "dtype": "float32"}
ROW = {"condition": "idle", "context": 8, "decode_share": 0.5, "prefill_tokens_per_s": 100.0}
CONTENDER = {"failure": None, "is_ours": True, "tokens_per_s": {"idle": {"decode B=1": 5.0, "prefill 8": 50.0}}}
DOCUMENTS = {
    "micro": {
        **MACHINE,
        "read_bytes_per_s": 3e10,
        "linear": [
            {"layer": layer, "form": form, "kernels": kernels, "rows": rows, "gb_per_s": 10.0}
            for layer in ("wo", "w2")
            for form in ("dense", "int4")
            for kernels in ("PyTorch", "compiled")
            for rows in (1, 4)
        ],
    },
    "engine": {
        **MACHINE,
        "rows": [
            {**ROW, "contender": name, "batch": batch, "decode_tokens_per_s": 20.0 * batch}
            for name in ("llama_tp", "transformers")
            for batch in (1, 8)
        ],
    },
    "load": {"checkpoint": "tiny", **ARRIVING, **SERVED, "beside": SERVED},
    "serve": {"url": "http://a/predictions/m", **ARRIVING, "runs": [{"native": SERVED, "openai": SERVED}] * 2},
    "checkpoint": {
        "size_gb": 2.0,
        "measures": {"cat": {"gb_per_s": 9.0, "peak_bytes": None}, "load": {"gb_per_s": 3.0, "peak_bytes": 9}},
    },
    "comm": {"ranks": 2, "rows": [{"comm": "A", "what": "all-reduce", "median_us": 7.0, "p99_us": 70.0}]},
    "api": {"requests": 3, "us_per": {"native": {"parsing": 1.0, "request": 2.0, "token": 3.0}}},
    "quality": {"tokens": 9, "checkpoint": "a", "perplexity": 7.0, "against": {"checkpoint": "b", "perplexity": 6.0}},
    "compare": {
        **MACHINE,
        "contenders": [
            {"name": "llama_tp bf16", **CONTENDER},
            {"name": "transformers bf16", **CONTENDER, "is_ours": False},
            {"name": "llama.cpp Q4_1", "failure": "died with SIGILL while loading", "is_ours": False},
        ],
    },
}


@pytest.fixture
def draw():
    imported("matplotlib")
    from llama_tp.bench import plot

    return plot


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_panel_of_a_figure_has_values_and_a_unit_and_the_figure_a_title(draw, name):
    figure = draw.figure_of({"benchmark": name, **DOCUMENTS[name]})
    assert figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_ylabel() or axes.get_xlabel()
        assert axes.patches or axes.lines


def test_the_bars_are_as_long_as_the_values_and_named(draw):
    figure = draw.figure_of({"benchmark": "compare", **DOCUMENTS["compare"]})
    decode, prefill = figure.axes
    assert [bar.get_width() for bar in decode.patches] == [5.0, 5.0]
    assert [bar.get_width() for bar in prefill.patches] == [50.0, 50.0]
    assert [label.get_text() for label in decode.get_yticklabels()] == ["llama_tp bf16", "transformers bf16"]
    assert "llama.cpp Q4_1 died with SIGILL" in figure.get_suptitle()


def test_the_lines_go_through_the_values(draw):
    _, decode, share = draw.figure_of({"benchmark": "engine", **DOCUMENTS["engine"]}).axes
    assert [list(line.get_ydata()) for line in decode.lines] == [[20.0, 160.0]] * 2
    assert [list(line.get_ydata()) for line in share.lines] == [[50.0, 50.0]] * 2


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_benchmark_ends_with_its_document_and_draws_it(draw, tmp_path, capsys, suffix):
    path = tmp_path / f"plot.{suffix}"
    check_plot(str(path))
    finish("quality", DOCUMENTS["quality"], str(path))
    assert json.loads(capsys.readouterr().out) == {"benchmark": "quality", **DOCUMENTS["quality"]}
    assert path.stat().st_size > 1000


def test_without_matplotlib_it_is_said_how_to_get_it_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed; run pip install 'llama-tp\[plot\]'"):
        check_plot("a.png")
    check_plot(None)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a.gif", "must be a file that ends in .png, .svg or .pdf"),
        ("no/where/a.png", "must be in a folder that exists"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused_first(monkeypatch, path, words):
    monkeypatch.setattr(report, "find_spec", lambda _name: object())
    with pytest.raises(ValueError, match=words):
        check_plot(path)
