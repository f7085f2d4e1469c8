"""Ranks of one host load a checkpoint of several files: load_verification_worker FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama_tp.checkpoint.store import hash_cache, load_verification, verify
from llama_tp.checkpoint.store.reading import load
from llama_tp.parallel.agreement import gather
from llama_tp.parallel.launch import exit_rank
from tests.tiny_checkpoint import flip_bit, meta_tensors


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    load_verification.SMALL, verify.SMALL = 0, -1  # the quick check, which every rank makes, is to hash no file
    hash_cache._SETTLED_NS = -1
    hashed: list[str] = []
    check_hash = load_verification.check_hash

    def record(path, *args):
        hashed.append(path.name)
        return check_hash(path, *args)

    load_verification.check_hash = record
    names = sorted({name for name in os.listdir(folder) if name != "manifest.json"})
    target = {name: torch.zeros_like(tensor) for name, tensor in meta_tensors().items()}

    load(target, folder, verify_files="once")
    shares = gather(list(hashed))
    assert sorted(name for share in shares for name in share) == names, shares
    assert all(shares), shares

    hashed.clear()
    load(target, folder, verify_files="once")
    assert gather(list(hashed)) == [[] for _ in shares]

    # The largest file of each rank, chosen before one is written to.
    damaged = [
        max(set(share) - {".metadata", "tensors.json"}, key=lambda name: os.path.getsize(Path(folder, name)))
        for share in shares
    ]
    dist.barrier()
    for name in damaged:
        if dist.get_rank() == 0:
            flip_bit(Path(folder, name), 5000)
        dist.barrier()
        with pytest.raises(ValueError, match=f"{name} is corrupt"):
            load(target, folder, verify_files="once")
        dist.barrier()
        if dist.get_rank() == 0:
            flip_bit(Path(folder, name), 5000)
        dist.barrier()
    dist.destroy_process_group()
    exit_rank()


if __name__ == "__main__":
    main(sys.argv[1])
