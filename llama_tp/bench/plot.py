"""Draws the JSON document of a benchmark: `--plot FILE`. matplotlib is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_tp.bench.neighbour import BESIDE, IDLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
_PANEL = (4.8, 4.0)
"""Inches."""


def draw(document: Document, path: str) -> None:
    """Draw a document to a file, whose suffix says how."""
    figure = figure_of(document)
    figure.savefig(path, dpi=150)


def figure_of(document: Document) -> Figure:
    """The figure of a document, by its benchmark."""
    figure = _DRAWINGS[document["benchmark"]](document)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _panels(title: str, count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * count, _PANEL[1]), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _bars(axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str) -> None:
    """Groups of bars, one for each label, with a bar of each series, from zero."""
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [at + (index - (len(series) - 1) / 2) * width for at in range(len(labels))]
        axes.bar(places, [value or 0.0 for value in values], width, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(unit)
    if len(series) > 1:
        axes.legend(fontsize=8)


def _lying_bars(axes: Axes, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
    """One bar for each label, from top to bottom, with its value."""
    bars = axes.barh(range(len(labels)), values)
    shown = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    axes.bar_label(bars, shown, padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def _micro(document: Document) -> Figure:
    rows = sorted({one["rows"] for one in document["linear"]})
    title = f"{document['model']}: rate at which linear layers read their weights ({document['device']})"
    figure, panels = _panels(title, len(rows))
    layers = list(dict.fromkeys(one["layer"] for one in document["linear"]))
    forms = list(dict.fromkeys(_form(one) for one in document["linear"]))
    rates = {(one["layer"], _form(one), one["rows"]): one["gb_per_s"] for one in document["linear"]}
    for axes, count in zip(panels, rows, strict=True):
        read = axes.axhline(document["read_bytes_per_s"] / 1e9, color="black", linestyle="--", linewidth=1)
        read.set_label("read bandwidth")
        _bars(axes, layers, {form: [rates.get((layer, form, count)) for layer in layers] for form in forms}, "GB/s")
        axes.set_title(f"M = {count}", fontsize=10)
        axes.set_xlabel("layer")
    return figure


def _form(rate: Document) -> str:
    return f"{rate['form']}, {rate['kernels']}"


def _engine(document: Document) -> Figure:
    title = f"{document['model']}, {document['dtype']}, {document['device']}, {document['threads']} thread(s)"
    figure, (prefill, decode, share) = _panels(title, 3)
    lines: dict[str, list[Document]] = {}
    for row in document["rows"]:
        beside = f" ({BESIDE})" if row["condition"] == BESIDE else ""
        lines.setdefault(f"{row['contender']}{beside}, {row['context']} tokens before", []).append(row)
    for label, rows in lines.items():
        batches = [row["batch"] for row in rows]
        decode.plot(batches, [row["decode_tokens_per_s"] for row in rows], marker="o", label=label)
        share.plot(batches, [100 * row["decode_share"] for row in rows], marker="o", label=label)
        if rows[0]["prefill_tokens_per_s"] is not None:
            prefill.plot(batches, [row["prefill_tokens_per_s"] for row in rows], marker="o", label=label)
    for axes, name, unit in (
        (prefill, "Prefill", "tokens/s"),
        (decode, "Decode", "tokens/s"),
        (share, "Decode: share of read bandwidth", "%"),
    ):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("batch size")
        axes.set_ylabel(unit)
        axes.set_xscale("log", base=2)
        batches = sorted({row["batch"] for row in document["rows"]})
        axes.set_xticks(batches, [str(size) for size in batches])
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.legend(fontsize=7)
    return figure


_LATENCIES = ("ttft", "tpot", "itl")


def _latencies(title: str, columns: Mapping[str, Document]) -> Figure:
    figure, panels = _panels(title, 4)
    names = list(columns)
    _bars(panels[0], names, {"": [one["output_throughput"] for one in columns.values()]}, "tokens/s")
    panels[0].set_title("Output throughput", fontsize=10)
    for axes, name in zip(panels[1:], _LATENCIES, strict=True):
        kinds = {kind: [one[f"{kind}_{name}_ms"] for one in columns.values()] for kind in ("median", "p99")}
        _bars(axes, names, kinds, "ms")
        axes.set_title(name.upper(), fontsize=10)
    return figure


def _load(document: Document) -> Figure:
    columns = {"idle": document} | ({BESIDE: document[BESIDE]} if BESIDE in document else {})
    return _latencies(f"{document['checkpoint']}: {document['requests']} requests, {_arrivals(document)}", columns)


def _serve(document: Document) -> Figure:
    served = document.get("url") or document["checkpoint"]
    runs = document["runs"]
    columns = {f"{name}\nrun {number}": run[name] for number, run in enumerate(runs, 1) for name in run}
    return _latencies(f"{served}: {document['requests']} requests, {_arrivals(document)}", columns)


def _arrivals(document: Document) -> str:
    how = f"{document['rate']:g} per second" if document["rate"] else "all at once"
    return f"{how}, concurrency {document['concurrency']}" if document["concurrency"] else how


def _checkpoint(document: Document) -> Figure:
    figure, (speed, memory) = _panels(f"Checkpoints of {document['size_gb']} GB", 2)
    measures = document["measures"]
    _lying_bars(speed, list(measures), [one["gb_per_s"] for one in measures.values()], "GB/s")
    peaks = {name: one["peak_bytes"] / 1e6 for name, one in measures.items() if one["peak_bytes"] is not None}
    _lying_bars(memory, list(peaks), list(peaks.values()), "peak memory, MB")
    return figure


def _comm(document: Document) -> Figure:
    kinds = ("median", "p99")
    figure, panels = _panels(f"Communication between {document['ranks']} ranks", len(kinds))
    labels = [f"{row['comm']}\n{row['what']}" for row in document["rows"]]
    for axes, kind in zip(panels, kinds, strict=True):
        _lying_bars(axes, labels, [row[f"{kind}_us"] for row in document["rows"]], "microseconds")
        axes.set_title(kind, fontsize=10)
    return figure


def _api(document: Document) -> Figure:
    kinds = ("parsing", "request", "token")
    figure, panels = _panels(f"CPU time of the API layer ({document['requests']} requests)", len(kinds))
    routes = list(document["us_per"])
    for axes, kind in zip(panels, kinds, strict=True):
        _lying_bars(axes, routes, [document["us_per"][route][kind] for route in routes], "microseconds")
        axes.set_title(f"per {kind}", fontsize=10)
    return figure


def _quality(document: Document) -> Figure:
    figure, panels = _panels(f"Perplexity over {document['tokens']} tokens", 1)
    values = {document["checkpoint"]: document["perplexity"]}
    if "against" in document:
        values[document["against"]["checkpoint"]] = document["against"]["perplexity"]
    _lying_bars(panels[0], list(values), list(values.values()), "perplexity (lower is better)")
    return figure


def _compare(document: Document) -> Figure:
    working = [one for one in document["contenders"] if one["failure"] is None]
    failed = [f"{one['name']} {one['failure']}" for one in document["contenders"] if one["failure"] is not None]
    title = f"{document['model']}, {document['device']}, {document['threads']} thread(s) each"
    names = [one["name"] for one in working]
    cases = list(working[0]["tokens_per_s"][IDLE]) if working else ["nothing ran"]
    figure, panels = _panels("\n".join([title, *failed]), len(cases))
    for axes, case in zip(panels, cases, strict=True):
        _lying_bars(axes, names, [one["tokens_per_s"][IDLE].get(case, 0.0) for one in working], "tokens/s")
        axes.set_title(case, fontsize=10)
        for bar, one in zip(axes.patches, working, strict=True):
            bar.set_color("tab:blue" if one["is_ours"] else "tab:gray")
    return figure


_DRAWINGS: Mapping[str, Callable[[Document], Figure]] = {
    "micro": _micro,
    "engine": _engine,
    "load": _load,
    "serve": _serve,
    "checkpoint": _checkpoint,
    "comm": _comm,
    "api": _api,
    "quality": _quality,
    "compare": _compare,
}
