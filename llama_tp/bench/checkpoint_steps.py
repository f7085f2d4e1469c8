"""The steps of `llama-tp bench checkpoint`, each in a fresh process: python -m llama_tp.bench.checkpoint_steps STEP ...

Prints the seconds of the step itself, without starting Python and importing torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from llama_tp.checkpoint.convert import process_group
from llama_tp.checkpoint.export import export
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.quantizing import quantizing
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.stored import MODEL_ARGS
from llama_tp.checkpoint.store.verify import verify
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join

_BLOCK = 8 << 20


def convert(source: str, destination: str, quantize: str | None = None) -> None:
    """A conversion without what takes no time: tokenizer, staging folder."""
    folder = Path(destination)
    folder.mkdir()
    reader = open_checkpoint(source)
    if quantize is not None:
        reader = quantizing(reader, quantize)
    with process_group():
        files = dcp.save(reader, folder)
    reader.args.save(folder / MODEL_ARGS)
    write_manifest(folder, known=files, about=reader.about)


def export_to(checkpoint: str, destination: str, kind: str, shards: str | None = None) -> None:
    """`llama-tp export`."""
    export(checkpoint, destination, format=kind, model_parallel_size=None if shards is None else int(shards))


def read(checkpoint: str) -> None:
    """Read all weight files into fresh memory, in one thread."""
    for path in sorted(Path(checkpoint).glob("*.distcp")):
        memory = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
        with path.open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(memory[done : done + _BLOCK]):
                done += count
        _kept.append(memory)


_kept: list[memoryview] = []
"""What was read, as a load keeps it."""


def load(checkpoint: str, verify_files: str) -> None:
    """Load the model in bfloat16 on one rank on the CPU."""
    args = ModelArgs.load_converted(Path(checkpoint) / MODEL_ARGS)
    load_model(checkpoint, args, join("cpu"), torch.bfloat16, verify_files=verify_files)


def check(checkpoint: str) -> None:
    """`llama-tp verify` without the tokenizer."""
    verify(checkpoint)


def nothing() -> None:
    """The memory of a process that has only started."""


STEPS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "export": export_to,
    "read": read,
    "load": load,
    "verify": check,
    "nothing": nothing,
}


def main(name: str, *arguments: str) -> None:
    """Run one step and print its seconds."""
    start = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        STEPS[name](*arguments)
    print(perf_counter() - start, flush=True)
    os._exit(0)  # returning memory is not part of a step


if __name__ == "__main__":
    main(*sys.argv[1:])
