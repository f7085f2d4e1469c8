"""Large tensors on CPUs lie in memory that the system may back with huge pages."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from llama_tp.model import memory
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.memory import HUGE_PAGE, empty

CPU = torch.device("cpu")


@pytest.fixture
def advised():
    """Whether the system has been asked for huge pages where a tensor lies."""
    if "hg" not in _flags_of_a_mapping_in_huge_pages():
        pytest.skip("this system has no huge pages")

    def is_advised(tensor: torch.Tensor) -> bool:
        return "hg" in flags_at(tensor.data_ptr())

    return is_advised


def flags_at(address: int) -> list[str]:
    """Of this process's mapping at an address; empty if there is none."""
    flags: list[str] = []
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_inside = begin <= address < end
        elif is_inside and first == "VmFlags:":
            flags = rest
    return flags


def _flags_of_a_mapping_in_huge_pages() -> list[str]:
    mapping = mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return []
    return flags_at(torch.frombuffer(mapping, dtype=torch.uint8).data_ptr())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_tensor_has_the_shape_and_dtype_and_keeps_what_is_written(dtype):
    for shape in ((0,), (3, 5), (HUGE_PAGE, 3)):
        tensor = empty(shape, dtype, CPU)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert torch.equal(tensor.fill_(7), torch.full(shape, 7, dtype=dtype))


def test_large_tensors_and_the_cache_are_advised_and_small_ones_are_not(advised):
    assert advised(empty((HUGE_PAGE,), torch.uint8, CPU))
    assert not advised(empty((HUGE_PAGE // 2,), torch.uint8, CPU))
    cache = KVCache(
        n_layers=2, num_pages=64, page_size=16, num_kv_heads=4, head_dim=64, dtype=torch.float32, device=CPU
    )
    assert advised(cache.memory())
    assert not cache.memory().any()


def test_memory_lives_as_long_as_any_view_of_it():
    tensor = empty((4 * HUGE_PAGE,), torch.uint8, CPU)
    address, view = tensor.data_ptr(), tensor.fill_(1)[HUGE_PAGE : HUGE_PAGE + 8]
    del tensor
    gc.collect()
    assert view.tolist() == [1] * 8
    assert flags_at(address)
    del view
    gc.collect()
    assert not flags_at(address)


def test_what_cannot_be_allocated_is_a_memory_error():
    with pytest.raises(MemoryError, match=r"^4611686018427387904 bytes cannot be allocated: "):
        empty((2**60,), torch.float32, CPU)


def test_a_system_without_huge_pages_has_ordinary_ones(monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Mapping)
    assert empty((HUGE_PAGE,), torch.uint8, CPU).fill_(3).sum() == 3 * HUGE_PAGE
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    assert empty((HUGE_PAGE,), torch.uint8, CPU).fill_(3).sum() == 3 * HUGE_PAGE
