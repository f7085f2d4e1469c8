"""A rank in trouble while the group forms, under torchrun. Prints a line `RESULT` of JSON. See test_meet.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from llama_tp.cli import command
from llama_tp.parallel import launch
from llama_tp.parallel.agreement import agree
from llama_tp.torchserve import worker as start
from llama_tp.torchserve.worker import load_rank
from tests.e2e.torchserve_rig import CONFIG

RANK = int(os.environ["RANK"])


def no_device(_: str) -> None:
    """Rank 1 is asked for a GPU that it does not have, rank 0 has its own."""
    if RANK == 1:
        launch.torch.cuda.device_count = lambda: 0
        launch.join("cuda")
    launch.join("cpu")


def kinds(_: str) -> None:
    """Rank 1 is told it has a GPU."""
    if RANK == 1:
        launch.resolve_device = lambda _name: launch.torch.device("cuda", 0)
    launch.join("auto")


def bad_config(folder: str) -> None:
    """Rank 1's model-config.yaml has a typing error; nothing is wrong with rank 0's."""
    if RANK == 0:
        start._read = lambda *_: (None,) * 5
    load_rank(lambda: {**CONFIG, "batchSise": 8}, Path(folder), lead=RANK == 0)


def sockets(_: str) -> None:
    """Where this rank listens once the group has formed, and the interface that gloo was told to use."""
    launch.join("cpu")
    dist.barrier()
    ours = psutil.Process().net_connections("inet")
    addresses = {one.laddr.ip for one in ours if one.status == psutil.CONN_LISTEN}
    raise ValueError([*sorted(addresses), os.environ.get("GLOO_SOCKET_IFNAME")])


def stuck(folder: str) -> None:
    """Rank 1 never comes to the collective that rank 0 waits in."""
    launch.join("cpu")
    Path(folder, f"pid{RANK}").write_text(str(os.getpid()))
    if RANK == 1:
        time.sleep(600)
    agree(lambda: None)


def main(case: str, folder: str) -> None:
    if case == "stuck":
        sys.argv[1:] = []
        command.run_command(lambda: stuck(folder), name="stuck")
    begin = time.monotonic()
    try:
        globals()[case](folder)
        heard = None
    except (ValueError, RuntimeError) as error:
        heard = error.args[0]
    print("RESULT " + json.dumps({"rank": RANK, "heard": heard, "seconds": time.monotonic() - begin}), flush=True)
    if dist.is_initialized():
        dist.barrier()
    launch.exit_rank()


if __name__ == "__main__":
    main(*sys.argv[1:])
