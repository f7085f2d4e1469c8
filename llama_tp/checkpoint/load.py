"""Load this rank's model, as local modules, from a checkpoint folder."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from llama_tp.checkpoint.store import dcp
from llama_tp.config import ModelArgs
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import weight_shapes
from llama_tp.parallel.agreement import agree
from llama_tp.parallel.apply import drop_padding, localize, parallelize
from llama_tp.parallel.launch import Group
from llama_tp.parallel.sharding import Ranks, check_tp_size, shard, tp_dim


def load_model(
    folder: str,
    args: ModelArgs,
    group: Group,
    dtype: torch.dtype,
    *,
    verify_files: str = "once",
    ranks: Ranks | None = None,
) -> Transformer:
    """Load this rank's share of a checkpoint in `dtype` onto its device, ready to compute.

    ValueError, on every rank, if the folder does not match its manifest or this model, or the model cannot be split
    over these ranks. No rank ever holds the whole model. `ranks`: the shares; None: equal ones.
    """
    ranks = group.comm.size if ranks is None else ranks
    check_tp_size(args, ranks)
    with torch.device("meta"):
        model = Transformer(args).to(dtype).requires_grad_(False).eval()
    if group.mesh is not None:
        parallelize(model, group.mesh, ranks)
        drop_padding(model, ranks, group.comm.rank)
    agree(lambda: model.to_empty(device=group.device))
    model.tie_embeddings()  # to_empty gave the two names separate tensors
    dcp.load(_slices(model, ranks, group.comm.rank), folder, verify_files=verify_files)
    return agree(lambda: localize(model, group.comm, ranks=ranks))


def _slices(model: Transformer, ranks: Ranks, rank: int) -> dict[str, dcp.Slices]:
    """Where each weight of the checkpoint goes. What is padding becomes zero."""
    parameters = dict(model.named_parameters())
    slices = {}
    for name, shape in weight_shapes(model.args).items():
        parameter = parameters[name].detach()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if (dim := tp_dim(name)) is None:
            slices[name] = dcp.Slices.whole(local)
            continue
        own = shard(model.args, name, ranks, rank)
        parts = own.compact.parts if local.size(dim) == own.length else own.parts
        if sum(len(entries) for _, entries in parts) < local.size(dim):
            local.zero_()
        targets = [(entries, local.narrow(dim, position, len(entries))) for position, entries in parts]
        slices[name] = dcp.Slices(dim, targets, shape)
    return slices


_MAX_BFLOAT16_BATCH = 2
"""Largest batch for which a CPU with AVX2 is faster in bfloat16 than in float32 (docs/performance.md)."""


def resolve_dtype(name: str, folder: str, device: torch.device, max_batch_size: int) -> torch.dtype:
    """The dtype to compute in. auto: the checkpoint's, or float32 where that is faster at this batch size."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    stored = dcp.checkpoint_dtype(folder)
    is_fast = stored == torch.float32 or _computes_natively(stored, device)
    return stored if is_fast or _reads_faster(stored, device, max_batch_size) else torch.float32


def _reads_faster(dtype: torch.dtype, device: torch.device, max_batch_size: int) -> bool:
    """Whether steps are bound by reading the weights, which half precision makes half as large."""
    is_measured = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return is_measured and dtype == torch.bfloat16 and max_batch_size <= _MAX_BFLOAT16_BATCH


def _computes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    # torch.cpu has no public name for this before 2.13.
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
