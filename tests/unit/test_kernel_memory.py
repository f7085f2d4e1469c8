"""The memory of the compiled kernels: how much it is, and that it is allocated before the first step."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.memory import MemoryModel
from llama_tp.model.cpu.buffers import KEYS_PER_PART
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.weights import STORED
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.compiled import CompiledTransformer
from tests.tiny_model import kernels, library_path, random_model

WIDE = ModelArgs(dim=512, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=64, ffn_hidden_dim=2816)
NARROW_HEADS = ModelArgs(dim=768, n_layers=1, n_heads=16, n_kv_heads=16, vocab_size=64, ffn_hidden_dim=1024)


class MallInfo(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    ]


def allocated() -> int:
    """Bytes that this process has allocated, on all heaps."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("this C library does not say how much is allocated")
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def compiled(args: ModelArgs, chosen: Kernels, dtype: torch.dtype, max_seq_len: int) -> CompiledTransformer:
    local = localize(random_model(args).to(dtype), SingleComm(), layout=STORED)
    cache = KVCache(
        n_layers=args.n_layers,
        num_pages=4,
        page_size=4,
        num_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        dtype=dtype,
        device="cpu",
    )
    return CompiledTransformer(local, cache, chosen, max_seq_len=max_seq_len, deterministic=False)


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("max_seq_len", [500, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("args", [WIDE, NARROW_HEADS], ids=["wide", "narrow heads"])
def test_the_buffers_are_those_that_the_budget_counts(monkeypatch, args, dtype, max_seq_len, num_threads):
    """They were not counted: 3.7 MB for each thread of an 8B model, and 268 MB for a context of 128k."""
    config = EngineConfig(max_seq_len=max_seq_len)
    counted = MemoryModel.of(args, config, 1, 0, dtype, "cpu", layout=STORED, num_threads=num_threads).buffers
    sizes = []
    create = kernels().library.create_model
    path = library_path()

    def create_measured(struct):
        sizes.append(-allocated())
        context = create(struct)
        sizes.append(allocated())
        return context

    before = allocated()
    chosen = Kernels(path, num_threads)
    of_team = allocated() - before
    monkeypatch.setattr(chosen.library, "create_model", create_measured)
    model = compiled(args, chosen, getattr(torch, dtype), max_seq_len)
    measured = of_team + sum(sizes)
    del model
    assert measured <= counted + (64 << 10) * num_threads  # of the threads' heaps
    if "avx512_bf16" in cpu_flags():
        assert counted <= 1.02 * measured


def cpu_flags() -> list[str]:
    with open("/proc/cpuinfo") as lines:
        return next((line.split() for line in lines if line.startswith("flags")), [])


def test_the_parts_of_attention_are_those_of_the_library():
    assert kernels().library.keys_per_part == KEYS_PER_PART


def test_each_rank_counts_its_own_buffers():
    config = EngineConfig(max_seq_len=40_000)

    def buffers(size: int) -> int:
        return MemoryModel.of(WIDE, config, size, 0, "bfloat16", "cpu", layout=STORED, num_threads=2).buffers

    assert 0.4 * buffers(1) < buffers(2) < 0.7 * buffers(1)


def in_limited_process(code: str) -> str:
    """What Python code prints in a process of its own. `leave(n)` leaves it n more bytes of address space."""
    done = subprocess.run(
        [sys.executable, "-c", f"{LIMIT}\n{textwrap.dedent(code)}", str(library_path())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # Small tensors find memory, and buffers do not: they are mapped.
        env={**os.environ, "MALLOC_TOP_PAD_": str(4 << 20), "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


LIMIT = """
import re, resource, sys
from pathlib import Path
import torch
from llama_tp.model.cpu.kernels import Kernels, linear_struct
from tests.unit.test_kernel_memory import WIDE, compiled

def leave(num_bytes):
    used = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, -1))

torch.set_num_threads(1)
kernels = Kernels(Path(sys.argv[1]), 3)
"""


@pytest.mark.parametrize("mib", [0, 20, 34])
def test_buffers_that_do_not_fit_are_an_error_of_python(mib):
    """Wherever the memory ends, in the worker threads, too: a failure there ended the process."""
    printed = in_limited_process(f"""
        create = kernels.library.create_model

        def create_limited(struct):
            leave({mib} << 20)
            try:
                return create(struct)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

        kernels.library.create_model = create_limited
        try:
            compiled(WIDE, kernels, torch.bfloat16, max_seq_len=128_000)
        except MemoryError as error:
            print(error)
        kernels.library.create_model = create
        compiled(WIDE, kernels, torch.bfloat16, max_seq_len=128_000)
    """)
    assert printed == "there is not enough memory for the buffers of the compiled kernels\n"


def test_a_product_for_which_there_is_no_memory_is_an_error_of_python():
    printed = in_limited_process("""
        weight, x = torch.ones(8, 1 << 20), torch.ones(16, 1 << 20)
        leave(150 << 20)  # for two of three threads
        try:
            kernels.multiply(weight, None, x, may_round=False)
        except MemoryError as error:
            print(error)
        print(kernels.multiply(torch.ones(8, 64), None, torch.ones(1, 64), may_round=False)[0, 0].item())
    """)
    assert printed.splitlines() == ["a product of 16 tokens and 1048576 columns", "64.0"]


@pytest.mark.parametrize("columns", [WIDE.dim, WIDE.hidden_dim])
def test_with_no_memory_left_a_model_can_still_multiply(columns):
    """Products of many tokens allocated their buffers in each step, in the worker threads."""
    printed = in_limited_process(f"""
        model = compiled(WIDE, kernels, torch.bfloat16, max_seq_len=500)
        weight, x = torch.ones(96, {columns}).bfloat16(), torch.ones(64, {columns})
        struct, _ = linear_struct(weight, None)
        halves, out = x.bfloat16(), torch.empty(64, 96).bfloat16()
        leave(0)
        print(kernels.multiply(weight, None, x, may_round=True)[0, 0].item())
        if kernels.multiplies_batches(weight):
            kernels.multiply_batch(struct, halves, out)
            assert (out == {columns}).all()
    """)
    assert printed == f"{columns:.1f}\n"
