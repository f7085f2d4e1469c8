"""Two ranks load a checkpoint into DTensors and compare with what torch.chunk gives; then one of them cannot."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llama_tp.checkpoint.store import dcp
from llama_tp.parallel.launch import exit_rank
from llama_tp.parallel.sharding import tp_dim
from tests.tiny_checkpoint import meta_tensors


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
    dcp.load(target, folder)
    for name, tensor in tensors.items():
        dim = tp_dim(name)
        expected = tensor if dim is None else tensor.chunk(size, dim)[rank]
        assert torch.equal(target[name].to_local(), expected), name

    if rank == 1:
        del target["norm.weight"]
    with pytest.raises(ValueError, match=r"norm\.weight is in the checkpoint but not in the model"):
        dcp.load(target, folder)
    dist.destroy_process_group()
    exit_rank()


if __name__ == "__main__":
    main(sys.argv[1])
