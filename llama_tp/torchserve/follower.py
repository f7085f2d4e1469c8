"""A rank on another host: it computes what the leader, which TorchServe runs, plans, and needs no TorchServe itself."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from llama_tp.config import ConfigError
from llama_tp.engine.loop import EXIT_STEP_FAILED
from llama_tp.parallel.launch import exit_rank
from llama_tp.torchserve.config import ModelConfig, TorchrunSection, read_yaml
from llama_tp.torchserve.worker import LoadedRank, load_rank

log = logging.getLogger(__name__)


def follow_leader(config_file: str, model_dir: str | None = None) -> None:
    """Join the group, load this rank's share and follow the leader until it releases us.

    Relative paths of the configuration are relative to model_dir, by default its own folder. Run it in the main thread
    of a process that torchrun started for several hosts; ValueError shows the command otherwise. SystemExit, after a
    log line, if any rank cannot load. A leader that falls silent ends the process with EXIT_STEP_FAILED.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        raise ValueError(_how_to_start(config_file, ModelConfig.load(config_file).torchrun))
    # A handler in Python would have to wait until a collective, which may take minutes, returns.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log.info("%s: waiting until all ranks are here and have loaded", _place())
    try:
        rank = load_rank(lambda: read_yaml(config_file), Path(model_dir or Path(config_file).parent), lead=False)
    except RuntimeError:  # every rank logs the reason
        raise SystemExit(1) from None
    _follow(rank)


def _follow(rank: LoadedRank) -> None:
    engine = rank.engine
    log.info("%s: loaded; following the leader (%s)", _place(), type(engine.comm).__name__)
    try:
        rank.thread.call(engine.follow)
    except Exception as error:
        # Peers break off as PeerLost between steps and as torch's RuntimeError within one. All else is a bug.
        reason = "; ".join(str(error).splitlines())[:500]
        log.critical("%s: ending: %s", _place(), reason, exc_info=not isinstance(error, RuntimeError))
        exit_rank(EXIT_STEP_FAILED)
    log.info("%s: ending: the leader has released this rank", _place())
    engine.comm.close()


def _place() -> str:
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"


def _how_to_start(config_file: str, torchrun: TorchrunSection) -> str:
    """What to do instead of starting this on its own. ConfigError if the configuration is one host's."""
    if torchrun.nnodes == 1:
        remedy = (
            "to the number of hosts and torchrun.rdzv-endpoint to HOST:PORT of the serving host, as others reach it"
        )
        raise ConfigError([f"{config_file}: torchrun.nnodes=1: no other host takes part; set torchrun.nnodes {remedy}"])
    return (
        f"`follow` runs under torchrun, once on every host but the serving one: torchrun --nnodes {torchrun.nnodes} "
        f"--nproc-per-node {torchrun.nproc_per_node} --rdzv-backend {torchrun.rdzv_backend} "
        f"--rdzv-endpoint {torchrun.rdzv_endpoint} --rdzv-id llama_29500 -m llama_tp follow --config {config_file} "
        "(llama_29500: the model's name and TorchServe's initial_distribution_port)"
    )
