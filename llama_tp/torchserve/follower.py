"""A rank on another host: it executes the plans of the leader, which TorchServe runs, and needs no TorchServe."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from llama_tp.config_error import ConfigError
from llama_tp.engine.loop import EXIT_STEP_FAILED
from llama_tp.parallel.launch import exit_rank
from llama_tp.torchserve.config import ModelConfig, TorchrunSection, read_yaml
from llama_tp.torchserve.worker import LoadedRank, load_rank

log = logging.getLogger(__name__)


def follow_leader(config_file: str, model_dir: str | None = None) -> None:
    """Join the group, load this rank's share and follow the leader until it releases this rank.

    Relative paths in the configuration are relative to model_dir, by default its own folder. Call in the main thread
    of a process that torchrun started for multiple hosts; otherwise a ValueError shows the command. SystemExit, after a
    log line, if any rank cannot load. If the leader falls silent, the process exits with EXIT_STEP_FAILED.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        raise ValueError(_how_to_start(config_file, ModelConfig.load(config_file).torchrun))
    # A Python handler would have to wait for a collective to return, which may take minutes.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log.info("%s: waiting for all ranks to start and load", _rank_name())
    try:
        rank = load_rank(lambda: read_yaml(config_file), Path(model_dir or Path(config_file).parent), lead=False)
    except RuntimeError:  # every rank logs the reason
        raise SystemExit(1) from None
    _follow(rank)


def _follow(rank: LoadedRank) -> None:
    engine = rank.engine
    log.info("%s: loaded; following the leader (%s)", _rank_name(), type(engine.comm).__name__)
    try:
        rank.thread.call(engine.follow)
    except Exception as error:
        # A lost peer raises PeerLost between steps and torch's RuntimeError within one. Anything else is a bug.
        reason = "; ".join(str(error).splitlines())[:500]
        log.critical("%s: exiting: %s", _rank_name(), reason, exc_info=not isinstance(error, RuntimeError))
        exit_rank(EXIT_STEP_FAILED)
    log.info("%s: exiting: the leader has released this rank", _rank_name())
    engine.comm.close()


def _rank_name() -> str:
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"


def _how_to_start(config_file: str, torchrun: TorchrunSection) -> str:
    """The torchrun command to use instead. ConfigError if the configuration is for one host."""
    if torchrun.nnodes == 1:
        remedy = (
            "to the number of hosts and torchrun.rdzv-endpoint to HOST:PORT of the serving host, as others reach it"
        )
        raise ConfigError(
            [f"{config_file}: torchrun.nnodes=1, so there are no other hosts; set torchrun.nnodes {remedy}"]
        )
    return (
        f"`follow` runs under torchrun, once on every host except the serving one: torchrun --nnodes {torchrun.nnodes} "
        f"--nproc-per-node {torchrun.nproc_per_node} --rdzv-backend {torchrun.rdzv_backend} "
        f"--rdzv-endpoint {torchrun.rdzv_endpoint} --rdzv-id llama_29500 -m llama_tp follow --config {config_file} "
        "(llama_29500: the model's name and TorchServe's initial_distribution_port)"
    )
