"""The weights of a comparison: one GGUF file, or random ones, in the form that each contender reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.bench.compare.gguf_forms import is_in_form, write_in_form
from llama_tp.bench.compare.spec import READS_GGUF, Spec
from llama_tp.bench.subject import architecture
from llama_tp.model_args import ModelArgs

_CONVERSIONS: Mapping[str, tuple[str | None, str | None]] = {
    "bf16": (None, "none"),
    "float32": (None, "none"),
    "int8": ("bf16", "int8"),
    "int4": ("Q4_1", None),
}
"""By our form: that of the GGUF file to convert (None: as it is), and `llama-tp convert --quantize`. From Q4_1, int4
keeps the numbers; only dense weights can be quantized to int8."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a contender finds its weights."""

    name: str
    args: ModelArgs
    model: str | None
    """Random weights of this architecture."""
    paths: dict[str, str]
    """By the contender's name: a converted checkpoint, or a GGUF file."""

    def of(self, spec: Spec) -> dict[str, Any]:
        """What the contender's process has to know."""
        return {"model": self.model} if self.model is not None else {"path": self.paths[spec.name]}


def random_source(model: str, specs: Sequence[Spec]) -> Source:
    """Random weights. ValueError if a contender reads only files."""
    if odd := [spec.name for spec in specs if spec.engine in READS_GGUF]:
        raise ValueError(f"contenders: {', '.join(odd)} cannot have random weights; leave them or --random-weights out")
    return Source(f"{model}, random weights", architecture(model), model, {})


def gguf_source(gguf: Path, folder: Path, specs: Sequence[Spec]) -> Source:
    """Write a file's weights into a folder in every form that the contenders need. All forms are made of the same dense
    weights, those of the file, except that one in Q4_1 is read in int4 as it is."""
    made: dict[str, Path] = {}
    for spec in specs:
        key = "dense" if spec.form in ("bf16", "float32") and spec.engine not in READS_GGUF else spec.form
        if key not in made:
            print(f"Preparing {spec.name} ...", flush=True)
            made[key] = _gguf(gguf, folder, spec.form) if spec.engine in READS_GGUF else _converted(gguf, folder, spec)
    keys = {spec.name: spec.form for spec in specs}
    keys |= {s.name: "dense" for s in specs if s.form in ("bf16", "float32") and s.engine not in READS_GGUF}
    ours = next(made[keys[spec.name]] for spec in specs if spec.is_ours)
    args = ModelArgs.load_converted(ours / "model_args.json")
    return Source(gguf.name, args, None, {name: str(made[key]) for name, key in keys.items()})


def _gguf(gguf: Path, folder: Path, form: str) -> Path:
    if is_in_form(gguf, form):
        return gguf
    path = folder / f"{gguf.stem.split('.')[0]}.{form}.gguf"
    write_in_form(gguf, path, form)
    return path


def _converted(gguf: Path, folder: Path, spec: Spec) -> Path:
    from llama_tp.checkpoint.convert import convert

    form, quantize = _CONVERSIONS[spec.form]
    path = folder / f"llama_tp.{spec.form}"
    convert(
        str(gguf if form is None else _gguf(gguf, folder, form)),
        None,
        None,
        str(path),
        max_seq_len=2048,
        max_batch_size=32,
        tp_max=1,
        model_args_path=str(path / "model_args.json"),
        quantize=quantize,
        overwrite=True,
    )
    return path
