"""Load an Engine, ready to run, from a checkpoint on a group of ranks, or make one with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol, TypeVar

import torch

from llama_tp.checkpoint.load import load_model, resolve_dtype
from llama_tp.checkpoint.random_model import random_model
from llama_tp.checkpoint.store.reading import StoredFiles
from llama_tp.config import EngineConfig
from llama_tp.engine.compilation import Compilation
from llama_tp.engine.engine import Engine
from llama_tp.engine.memory import MemoryModel
from llama_tp.engine.memory_probe import config_for_measuring, free_memory, measure_step, total_memory
from llama_tp.engine.runner import ModelRunner
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import PACKED, Layout, WeightFormats
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import TransientError, agree, gather
from llama_tp.parallel.launch import Group
from llama_tp.parallel.sharding import Ranks, check_tp_size, local_kv_heads, num_ranks
from llama_tp.threads import choose_num_threads, warn_of_spinning

log = logging.getLogger(__name__)

T = TypeVar("T")


class WeightSource(Protocol):
    """Where the weights of a model come from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of all that are not quantized."""
        ...

    @property
    def formats(self) -> WeightFormats: ...

    def load(self, args: ModelArgs, group: Group, dtype: torch.dtype, ranks: Ranks, layout: Layout) -> Transformer:
        """This rank's model as local modules. `layout`: of its linear layers on CPUs."""
        ...


class _CheckpointSource:
    """Weights in the folder of a converted checkpoint."""

    def __init__(self, folder: str, verify_files: str) -> None:
        self._folder, self._verify_files = folder, verify_files
        files = StoredFiles(folder)
        self.dtype, self.formats = files.dtype, files.formats

    def load(self, args: ModelArgs, group: Group, dtype: torch.dtype, ranks: Ranks, layout: Layout) -> Transformer:
        verify = self._verify_files
        return load_model(self._folder, args, group, dtype, verify_files=verify, ranks=ranks, layout=layout)


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Random weights, for measurements of speed."""

    formats: WeightFormats
    dtype: torch.dtype = torch.bfloat16

    def load(self, args: ModelArgs, group: Group, dtype: torch.dtype, ranks: Ranks, layout: Layout) -> Transformer:
        return random_model(args, group, dtype, self.formats, ranks, layout)


def load_engine(
    folder: str, args: ModelArgs, config: EngineConfig, group: Group, *, wait_for_kernels: bool = False
) -> Engine:
    """This rank's engine for a checkpoint. ValueError, on every rank, for any failure on any rank: a damaged checkpoint
    or one of another model, a context too long for it, too little memory, and so on.

    wait_for_kernels: return when it is settled whether steps run as compiled kernels, for measurements.
    """

    def open_weights() -> WeightSource:
        return _CheckpointSource(folder, config.verify_checkpoint)

    return make_engine(open_weights, args, config, group, wait_for_kernels=wait_for_kernels)


def make_engine(
    open_weights: Callable[[], WeightSource],
    args: ModelArgs,
    config: EngineConfig,
    group: Group,
    *,
    wait_for_kernels: bool = False,
) -> Engine:
    """This rank's engine for any weights; as `load_engine`."""
    if reason := args.why_too_long(config.max_seq_len):
        raise ValueError(reason)
    start = monotonic()
    device = group.device
    if device.type == "cuda":
        _prepare_cuda(device)
    else:
        threads = choose_num_threads(config.threads)
        torch.set_num_threads(threads)
        warn_of_spinning(threads)
    weights = agree(open_weights)
    dtype = agree(lambda: resolve_dtype(config.dtype, weights.dtype, device, config.max_batch_size))
    dtype_name = str(dtype).removeprefix("torch.")
    ranks = _ranks(args, config, group)
    compilation = agree(lambda: Compilation.start(config, device, dtype, wait=wait_for_kernels))
    layout = PACKED if compilation is None else compilation.layout
    needs = (group.comm.rank, dtype_name, device.type, weights.formats, layout, torch.get_num_threads())
    memory = MemoryModel.of(args, config, ranks, *needs)
    agree(lambda: _in_memory(memory.check, device))
    model = weights.load(args, group, dtype, ranks, layout)

    def make_runner(config: EngineConfig) -> ModelRunner:
        kv_heads = local_kv_heads(args, ranks, group.comm.rank)
        return ModelRunner(model, config, num_kv_heads=kv_heads, dtype=dtype, device=device)

    def measure() -> int:
        return measure_step(make_runner(config_for_measuring(config)), is_leader=group.comm.is_leader)

    step = agree(measure) if device.type == "cuda" else memory.buffers
    # Free memory may differ between ranks, but one scheduler plans for all.
    pages = min(gather(agree(lambda: _in_memory(lambda free: memory.num_pages(free, step), device))))
    config = replace(config, cache_pages=pages)
    runner = agree(lambda: make_runner(config))
    # In deterministic mode all ranks use the kernels or none: eager PyTorch pads tiles.
    may_use = not config.deterministic or all(gather(compilation is not None and compilation.is_compiled()))
    agree(lambda: None if compilation is None else compilation.begin(runner, may_use=may_use))
    if group.comm.is_leader:
        log.info(
            "loaded in %.1f s: %d rank(s) of %d thread(s), %s, %s; %.0f MiB of weights per rank; KV cache of %d tokens "
            "(%.1f sequences of max_seq_len=%d), %.0f MiB per rank%s",
            monotonic() - start,
            group.comm.size,
            torch.get_num_threads(),
            device.type,
            dtype_name,
            memory.weights / 2**20,
            config.cache_tokens,
            config.num_pages / config.pages_per_sequence,
            config.max_seq_len,
            config.num_pages * memory.page / 2**20,
            f"; {step / 2**20:.0f} MiB reserved for a step" if step else "",
        )
    quantization = sorted({one.name for one in weights.formats.values()})
    return Engine(runner, group.comm, config, quantization=quantization)


def _ranks(args: ModelArgs, config: EngineConfig, group: Group) -> Ranks:
    """The ranks with their shares. ValueError if there are not as many as shares, or the model cannot run on them."""
    ranks: Ranks = group.comm.size if config.tp_shares is None else config.tp_shares
    if num_ranks(ranks) != group.comm.size:
        raise ValueError(
            f"tp_shares={list(config.tp_shares or ())} has shares for {num_ranks(ranks)} ranks, but there are "
            f"{group.comm.size}; give each rank its query heads"
        )
    check_tp_size(args, ranks)
    return ranks


def _in_memory(check: Callable[[int | None], T], device: torch.device) -> T:
    """The result for the memory that is free now. TransientError if it would fit once other processes have freed
    theirs, ValueError if it never will."""
    try:
        return check(free_memory(device))
    except ValueError as error:
        reason = str(error)
    try:
        check(total_memory(device))
    except ValueError:
        raise ValueError(reason) from None
    raise TransientError(reason)


def _prepare_cuda(device: torch.device) -> None:
    """Configure CUDA for this thread and process."""
    torch.cuda.set_device(device)  # per thread: another thread may have joined the group
    # cuDNN attention builds a plan for every new length, 40 to 60 ms each: in decode, one per token (measured:
    # docs/performance.md). PyTorch 2.11 prefers it on Hopper.
    torch.backends.cuda.enable_cudnn_sdp(False)
