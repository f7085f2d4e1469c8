"""Joining the group, from torchrun's environment to a rank, a device, a mesh and a `Comm`; and leaving it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama_tp.parallel import shared_memory
from llama_tp.parallel.comm import Comm, GroupComm, SingleComm

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's place among the ranks of a model."""

    comm: Comm
    device: torch.device
    mesh: DeviceMesh | None
    """One-dimensional, axis "tp"; None for a group of one."""

    def agree(self, problem: str | None) -> str | None:
        """The first problem that any rank has, on every rank; None if all are well. A barrier."""
        if self.mesh is None:
            return problem
        problems: list[str | None] = [None] * self.comm.size
        dist.all_gather_object(problems, problem)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), None)


def resolve_device(name: str) -> torch.device:
    """The device of this rank. ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ValueError(
            f"device=cuda: local rank {local_rank} needs GPU number {local_rank}, but {available} are visible; "
            "lower nproc-per-node, or use device: cpu"
        )
    return torch.device("cuda", local_rank)


_LOAD_TIMEOUT = timedelta(hours=1)
"""Of the default group: ranks wait for each other while they read a checkpoint."""


def join(
    device: str = "auto", *, timeout_s: float = 20.0, lead: bool | None = None, deterministic: bool = False
) -> Group:
    """Join the group that torchrun's environment describes; a group of one without it.

    `lead`: whether this rank is the leader; exactly one must be. None: rank 0 is. A group of one leads itself and
    starts no process group. `timeout_s` is how long a step waits for a silent peer. `deterministic`: add up in rank
    order, always.

    From here on, a process that torchrun started dies with it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group(comm=SingleComm(), device=resolve_device(device), mesh=None)
    here = resolve_device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo", timeout=_LOAD_TIMEOUT)
    mesh = init_device_mesh(here.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    leader = _agree_on_leader(dist.get_rank() == 0 if lead is None else lead)
    return Group(comm=_make_comm(here, leader, timeout_s, deterministic), device=here, mesh=mesh)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends: a lost torchrun agent must not leave ranks behind."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between, so no signal will come
        os._exit(1)


def leave(status: int = 0) -> NoReturn:
    """End this rank at once, with what it has printed and logged written out.

    Not the way a process ends by itself: while the interpreter takes itself apart, the threads of torch's process
    groups have been seen to abort it ("terminate called without an active exception"), and torchrun takes one rank that
    aborts for the failure of all. Nor does it wait for peers, which a broken group would.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or closed: what was printed is lost
            status = status or 1
    os._exit(status)


def _agree_on_leader(lead: bool) -> int:
    claims: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(claims, lead)
    leaders = [rank for rank, claim in enumerate(claims) if claim]
    if len(leaders) != 1:
        raise RuntimeError(f"exactly one rank must lead, but {len(leaders)} do: ranks {leaders}")
    return leaders[0]


def _make_comm(device: torch.device, leader: int, timeout_s: float, deterministic: bool) -> Comm:
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    shared = None
    if one_host and shared_memory.is_supported():
        try:
            shared = shared_memory.SharedMemoryComm(leader=leader, timeout_s=timeout_s)
        except OSError as error:
            log.warning("falling back to gloo: %s", error)
    if shared is not None and device.type == "cpu":
        return shared
    return GroupComm(leader=leader, timeout_s=timeout_s, ordered=deterministic, plans=shared)
