"""`llama-tp bench compare`: our engine against others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llama_tp.cli.bench import as_list
from llama_tp.threads import available_cores

if TYPE_CHECKING:
    from llama_tp.bench.compare.sources import Source
    from llama_tp.bench.compare.spec import Spec


def compare(
    gguf: str | None = None,
    contenders: str | tuple[str, ...] | None = None,
    random_weights: bool = False,
    model: str | None = None,
    batch: int | tuple[int, ...] = (1, 16),
    context: int = 128,
    prompt: int = 512,
    new: int = 64,
    rounds: int = 3,
    repeats: int = 3,
    threads: int | None = None,
    limit_s: float = 180.0,
    neighbour: bool = False,
    folder: str | None = None,
    plot: str | None = None,
) -> None:
    """Compare our engine with transformers, llama.cpp and OpenVINO on this CPU. Ends with a line of JSON.

    All contenders have the same weights, prompts, token counts and threads, decode greedily without an early stop, and
    take turns, each in a process of its own. One that is missing, crashes or hangs gets a row that says so. A round in
    which other processes used more of the machine than in the calmest one is repeated.

    Args:
        gguf: the weights, a GGUF file; by default the demo's
        contenders: names separated by commas: llama_tp bf16|int8|int4|float32, transformers bf16|float32,
            llama.cpp Q4_1|Q8_0|bf16, openvino Q4_1|Q8_0|bf16; by default the installed ones, in most of these forms
        random_weights: instead of a file; needs --model, and only llama_tp and transformers can have them
        model: the architecture of random weights: a published name such as tinyllama-1.1b, or the path of a
            model_args.json, params.json or config.json
        batch: sequences to decode at the same time, comma-separated
        context: tokens of each prompt before decode
        prompt: tokens of the prompt for prefill, of one sequence
        new: tokens decoded for each sequence
        rounds: rounds that count, after one to warm up; medians are reported
        repeats: most rounds to repeat
        threads: CPU threads of each contender; by default all available cores
        limit_s: longest time for one answer of a contender, in seconds; loading is one
        neighbour: measure again beside a busy process
        folder: where to write the weights in all forms, and to keep them; by default TMPDIR, removed at the end
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.compare.spec import parse_specs
    from llama_tp.bench.report import check_plot

    check_plot(plot)
    specs = _default(random_weights) if contenders is None else parse_specs(contenders)
    from llama_tp.bench.compare.command import Settings, bench_compare

    settings = Settings(
        batches=as_list(batch),
        context=context,
        prompt=prompt,
        new=new,
        rounds=rounds,
        repeats=repeats,
        threads=available_cores() if threads is None else threads,
        limit_s=limit_s,
        neighbour=neighbour,
    )
    with tempfile.TemporaryDirectory(prefix="llama_tp.compare.") as temporary:
        source = _source(gguf, random_weights, model, Path(folder or temporary), specs)
        bench_compare(source, specs, settings, plot)


def _default(random_weights: bool) -> list[Spec]:
    """Those that are installed, and can have these weights."""
    from importlib.util import find_spec

    from llama_tp.bench.compare.spec import DEFAULT, PACKAGES, READS_GGUF, parse_specs

    specs = [spec for spec in parse_specs(DEFAULT) if not (random_weights and spec.engine in READS_GGUF)]
    missing = {spec.engine for spec in specs if spec.engine in PACKAGES and not find_spec(PACKAGES[spec.engine][0])}
    for engine in sorted(missing):
        print(f"Without {engine}, which is not installed: pip install '{PACKAGES[engine][1]}'")
    return [spec for spec in specs if spec.engine not in missing]


def _source(gguf: str | None, random_weights: bool, model: str | None, folder: Path, specs: list[Spec]) -> Source:
    from importlib.util import find_spec

    from llama_tp.bench.compare.sources import gguf_source, random_source

    if random_weights:
        if gguf is not None or model is None:
            raise ValueError("random_weights needs --model, and no file; leave one of them out")
        return random_source(model, specs)
    if model is not None:
        raise ValueError(f"model={model!r} is for random weights; add --random-weights, or leave it out")
    if find_spec("gguf") is None:
        raise ValueError("reading GGUF files needs the gguf package: pip install 'llama-tp[demo]'")
    folder.mkdir(parents=True, exist_ok=True)
    if gguf is None:
        from llama_tp.checkpoint.demo import extract_gguf

        return gguf_source(extract_gguf(folder), folder, specs)
    return gguf_source(Path(gguf), folder, specs)
