"""The `llama-tp` command. Each command is a thin wrapper around the library; see `llama-tp COMMAND --help`."""

from __future__ import annotations

import os
import sys
from typing import Any

from llama_tp import __version__
from llama_tp.cli import bench, bench_compare, bench_serve, cache, checkpoints, inspection, planning, serve, terminal
from llama_tp.cli.command import run_command
from llama_tp.threads import bound_spinning

COMMANDS: dict[str, Any] = {
    "demo": checkpoints.demo,
    "download": checkpoints.download,
    "convert": checkpoints.convert,
    "verify": checkpoints.verify,
    "inspect": inspection.inspect,
    "export": checkpoints.export,
    "plan": planning.plan,
    "generate": terminal.generate,
    "chat": terminal.chat,
    "config": serve.config,
    "package": serve.package,
    "serve": serve.serve,
    "stop": serve.stop,
    "health": serve.health,
    "cache": cache.cache,
    "follow": serve.follow,
    "bench": {
        "api": bench.api,
        "checkpoint": bench.checkpoint,
        "comm": bench.comm,
        "compare": bench_compare.compare,
        "engine": bench.engine,
        "load": bench.load,
        "micro": bench.micro,
        "quality": bench.quality,
        "serve": bench_serve.serve,
    },
}


def main() -> None:
    """Entry point of `llama-tp` and `python -m llama_tp`."""
    if sys.argv[1:] == ["--version"]:
        print(f"llama-tp {__version__}")
        return
    os.environ.setdefault("PAGER", "cat")  # fire shows help in a pager
    bound_spinning(os.environ)
    run_command(COMMANDS, name="llama-tp")
