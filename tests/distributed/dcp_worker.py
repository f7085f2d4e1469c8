"""Ranks load a checkpoint into DTensors, as PyTorch does by itself, and as slices; then one of them cannot."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llama_tp.checkpoint.store.reading import Slices, load
from llama_tp.parallel.launch import exit_rank
from llama_tp.parallel.sharding import shard, tp_dim
from tests.tiny_checkpoint import ARGS, meta_tensors


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    tensors = meta_tensors()
    target = {}
    for name, tensor in tensors.items():
        dim = tp_dim(name)
        placement = Replicate() if dim is None else Shard(dim)
        target[name] = distribute_tensor(torch.zeros_like(tensor), mesh, [placement])
    torch_dcp.load(target, checkpoint_id=folder)
    for name, tensor in tensors.items():
        dim = tp_dim(name)
        chunk = tensor if dim is None else tensor.chunk(size, dim)[rank]
        assert torch.equal(target[name].to_local(), chunk), name

    slices, expected = {}, {}
    for name, tensor in tensors.items():
        dim = tp_dim(name)
        if dim is None:
            slices[name] = Slices.whole(torch.zeros_like(tensor))
            expected[name] = [tensor]
        else:
            held = [entries for _, entries in shard(ARGS, name, size, rank).parts]
            expected[name] = [tensor.narrow(dim, one.start, len(one)) for one in held]
            targets = [torch.zeros_like(one) for one in expected[name]]
            slices[name] = Slices(dim, list(zip(held, targets, strict=True)), tuple(tensor.shape))
    load(slices, folder)
    for name, one in slices.items():
        assert all(torch.equal(target, want) for (_, target), want in zip(one.parts, expected[name], strict=True)), name

    if rank == 1:
        del slices["norm.weight"]
    with pytest.raises(ValueError, match=r"norm\.weight is in the checkpoint but not in the model"):
        load(slices, folder)
    dist.destroy_process_group()
    exit_rank()


if __name__ == "__main__":
    main(sys.argv[1])
