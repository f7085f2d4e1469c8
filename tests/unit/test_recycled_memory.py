"""Memory is used again when the last tensor in it is freed, and never before."""

from __future__ import annotations

import gc

import torch

from llama_tp.checkpoint.memory import RecycledMemory

SHAPE = (1 << 10, 1 << 10)


def test_memory_is_used_again_once_no_tensor_shares_it():
    memory = RecycledMemory()
    first = memory.tensor(SHAPE, torch.bfloat16)
    address = first.data_ptr()
    view = first[5:, 7:]
    del first
    gc.collect()
    second = memory.tensor(SHAPE, torch.bfloat16)
    assert second.data_ptr() != address, "a view of the first is alive"
    view.fill_(1)
    second.zero_()
    assert view.sum() == view.numel()
    del view
    gc.collect()
    third = memory.tensor((1 << 10, 1 << 9), torch.float32)
    assert third.data_ptr() == address
    assert third.data_ptr() != second.data_ptr()


def test_a_tensor_that_is_used_for_long_does_not_hold_up_others():
    memory = RecycledMemory()
    kept = [memory.tensor(SHAPE, torch.int8).fill_(number) for number in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == 5
    del memory
    gc.collect()
    assert [int(tensor[3, 3]) for tensor in kept] == list(range(5))


def test_small_tensors_are_not_worth_a_mapping():
    memory = RecycledMemory()
    assert memory.tensor((3, 4), torch.float16).shape == (3, 4)
    assert not memory._kept
