"""How every benchmark ends: with one JSON document on the last line of stdout, and a plot of it if one is wanted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_plot(plot: str | None) -> None:
    """Before anything is measured: ValueError, with the remedy, if no plot could be drawn to this file."""
    if plot is None:
        return
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; run pip install 'llama-tp[plot]'")
    if Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"plot={plot!r} must be a file that ends in .png, .svg or .pdf")
    if not Path(plot).resolve().parent.is_dir():
        raise ValueError(f"plot={plot!r} must be in a folder that exists")


def finish(benchmark: str, document: Mapping[str, Any], plot: str | None = None) -> None:
    """Print the document, with the name of the benchmark, and draw it."""
    complete = {"benchmark": benchmark, **document}
    if plot is not None:
        from llama_tp.bench.plot import draw

        draw(complete, plot)
        print(f"Wrote {plot}", file=sys.stderr)
    sys.stderr.flush()
    print(json.dumps(complete), flush=True)
