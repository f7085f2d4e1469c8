#!/usr/bin/env python3
"""Test and benchmark llama_tp on one GPU, with one command in under eight minutes.

    python3 -u scripts/gpu_check.py --budget 470 [--sections a,b] [--checkpoint DIR] [--gpt-fast DIR] [--site FILE]

Needs torch, numpy and triton. Sections run in order of importance, in case time runs out; each prints its results as it
gets them, and $OUT/gpu_check.json has all of them. See gpu/README.md for what to read first.

--cpu-smoke runs everything on a CPU with tiny sizes, with plain torch instead of Triton, to test these scripts; with
TRITON_INTERPRET=1 and triton installed it also runs the Triton kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    a = _parse()
    sys.path.insert(0, str(Path(a.repo).resolve()))  # before llama_tp is imported
    import torch
    from gpu.device import CUDA, SMOKE
    from gpu.report import Report, run_sections, summarize

    torch.manual_seed(0)
    if SMOKE:
        torch.set_num_threads(1)
    if a.child:
        _run_child(a)
        return
    if not CUDA and not SMOKE:
        sys.exit("no GPU found; use --cpu-smoke to test this script on a CPU")
    report = Report(Path(a.out) / "gpu_check.json", a.budget, a.used)
    faulthandler.dump_traceback_later(max(5.0, report.total_left() + 20), exit=True)
    sections = _sections(a)
    names = [name for name, *_ in sections]
    only, skip = ({name for name in text.split(",") if name} for text in (a.sections, a.skip))
    if unknown := sorted((only | skip) - {*names, "none"}):
        sys.exit(f"no section {unknown[0]!r}; there are {', '.join(names)}")
    run_sections(report, [one for one in sections if (not only or one[0] in only) and one[0] not in skip])
    faulthandler.cancel_dump_traceback_later()
    sys.exit(0 if summarize(report) else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repo", default=str(ROOT), help="folder that contains llama_tp")
    parser.add_argument("--budget", type=float, default=470.0, help="total seconds")
    parser.add_argument("--sections", default="", help="run only these, comma-separated")
    parser.add_argument("--skip", default="", help="skip these, comma-separated")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder for gpu_check.json")
    parser.add_argument("--cpu-smoke", action="store_true", help="test these scripts on a CPU")
    parser.add_argument("--checkpoint", help="a converted checkpoint with real weights, for demo and tp2")
    parser.add_argument("--gpt-fast", help="folder of the gpt-fast repository")
    parser.add_argument("--gpt-fast-layers", type=int, default=16)
    parser.add_argument("--site", help="packages for section serve, a folder or a tar file; see gpu/README.md")
    parser.add_argument("--used", type=float, default=0.0, help=argparse.SUPPRESS)  # seconds before it was resumed
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _sections(a: argparse.Namespace) -> list[tuple[str, Callable[..., None], float]]:
    """Name, function, budget in seconds; in the order in which they run."""
    from gpu import attention, contenders, engine, hardware, prototype, ranks, serve, start

    repo = ["--repo", a.repo]
    sections: list[tuple[str, Callable[..., None], float]] = [
        ("env", hardware.env, 25),
        ("correct", engine.correct, 60),
        ("ranks", lambda r: ranks.ranks(r, repo), 40),
        ("tp2", lambda r: ranks.tp2(r, repo, a.checkpoint), 60),
        ("nccl", lambda r: ranks.nccl(r, repo), 30),
        ("memory", start.memory, 30),
        ("ceilings", hardware.ceilings, 40),
        ("engine", engine.engine, 100),
        ("prototype", prototype.prototype, 60),
        ("prefill", engine.prefill, 30),
        ("gemv", hardware.gemv, 30),
        ("profile", prototype.profile, 20),
        ("slice70b", engine.slice70b, 50),
        ("sdpa", attention.sdpa, 40),
        ("gqa_chunk", attention.gqa_chunk, 15),
        ("attention", attention.attention, 60),
        ("load", start.load, 60),
        ("serve", lambda r: serve.serve(r, repo, a.site), 150),
        ("transformers", lambda r: contenders.transformers(r, repo), 60),
        ("gptfast", lambda r: contenders.gptfast(r, repo, a.gpt_fast, a.gpt_fast_layers), 112),
    ]
    if a.checkpoint:
        sections.insert(2, ("demo", lambda r: start.demo(r, a.checkpoint), 45))
    return sections


def _run_child(a: argparse.Namespace) -> None:
    """Run a child process's part. Imports only what it needs."""
    if a.child in ("ranks", "tp2", "nccl"):
        from gpu import workers

        {"ranks": workers.ranks, "tp2": lambda: workers.tp2(a.checkpoint), "nccl": workers.nccl}[a.child]()
    elif a.child == "serve":
        from gpu import serve

        serve.child_serve(a.port, a.repo)
    else:
        from gpu import contenders

        if a.child == "transformers":
            contenders.child_transformers()
        else:
            contenders.child_gptfast(a.gpt_fast, a.gpt_fast_layers)


if __name__ == "__main__":
    main()
