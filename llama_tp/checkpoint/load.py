"""Load this rank's model, as local modules, from a checkpoint folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.reading import Slices, StoredFiles, open_on_all_ranks, stored_dtype
from llama_tp.checkpoint.store.table import check_shapes
from llama_tp.config import ModelArgs
from llama_tp.model.linear import is_packed
from llama_tp.model.transformer import Transformer, TransformerBlock
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
    over these ranks. No rank ever holds the whole model, nor its own share twice.

    `ranks`: the shares; None: equal ones.
    """
    ranks = group.comm.size if ranks is None else ranks
    check_tp_size(args, ranks)
    with torch.device("meta"):
        model = Transformer(args).to(dtype).requires_grad_(False).eval()
    if group.mesh is not None:
        parallelize(model, group.mesh, ranks)
        drop_padding(model, ranks, group.comm.rank)
    with open_on_all_ranks(folder) as files:
        agree(lambda: check_shapes(files.tensors, weight_shapes(args), folder))
        with agree(lambda: LoadVerification(folder, verify_files)) as verification:
            with verification.explaining():
                loader = agree(lambda: _Loader(model, files, group, dtype, ranks))
                agree(lambda: localize(model, group.comm, ranks=ranks, prepare=loader))
            verification.finish()
    return model


class _Loader:
    """Fills the parts of a model on the meta device from a checkpoint, in order: each while the one before it is being
    localized. Sharded parameters become this rank's local tensors."""

    def __init__(self, model: Transformer, files: StoredFiles, group: Group, dtype: torch.dtype, ranks: Ranks) -> None:
        self._args = model.args
        self._files = files
        self._group = group
        self._ranks = ranks
        # Packing copies a matrix. One that is not packed stays where it is read to.
        self._spare = deque([_nothing(), _nothing()]) if is_packed(group.device, dtype) else None
        parts = [("tok_embeddings", model.tok_embeddings), *_numbered("layers", model.layers), ("norm", model.norm)]
        self._parts = iter(parts if model.args.tied_embeddings else [*parts, ("output", model.output)])
        self._start_next()

    def __call__(self, part: nn.Module) -> None:
        """Wait until the next part is filled, which must be `part`."""
        assert part is self._part
        for future in self._reading:
            future.result()
        self._start_next()

    def _start_next(self) -> None:
        if (one := next(self._parts, None)) is not None:
            name, self._part = one
            self._materialize(self._part)
            self._reading = self._files.start(_slices(self._part, name, self._args, self._ranks, self._group.comm.rank))

    def _materialize(self, part: nn.Module) -> None:
        """Give a part local tensors on the device, with matrices that become one linear layer next to each other."""
        parameters = [(name, _local(one)) for name, one in part.named_parameters()]
        layout, size = {}, 0
        for name, local in sorted(parameters, key=_fused_first):
            layout[name] = size
            size += -(-local.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._memory(size) if isinstance(part, TransformerBlock) else self._fresh(size)
        for name, local in parameters:
            owner, _, attribute = name.rpartition(".")
            # What is not a matrix is kept, and is small.
            place = memory[layout[name] :] if local.dim() == 2 else self._fresh(local.nbytes)
            tensor = place[: local.nbytes].view(local.dtype).view(local.shape)
            part.get_submodule(owner).register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))

    def _memory(self, size: int) -> Tensor:
        """Memory for a part. If matrices are packed, that of the last but one is free again: fresh memory costs more
        than reading into it."""
        if self._spare is None:
            return self._fresh(size)
        memory = self._spare.popleft()
        if memory.nbytes < size:
            memory = self._fresh(size)
        self._spare.append(memory)
        return memory

    def _fresh(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._group.device)


_ALIGNMENT = 64
"""Bytes: of vector loads, and of any dtype."""
_FUSED = ("wq", "wk", "wv", "w1", "w3")


def _fused_first(parameter: tuple[str, Tensor]) -> int:
    module = parameter[0].split(".")[-2:][0]
    return _FUSED.index(module) if module in _FUSED else len(_FUSED)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _numbered(name: str, modules: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{index}", module) for index, module in enumerate(modules)]


def _slices(part: nn.Module, prefix: str, args: ModelArgs, ranks: Ranks, rank: int) -> dict[str, Slices]:
    """Where the weights of a part go. What is padding becomes zero."""
    shapes = weight_shapes(args)
    slices = {}
    for relative, parameter in part.named_parameters():
        name, local = f"{prefix}.{relative}", parameter.detach()
        if (dim := tp_dim(name)) is None:
            slices[name] = Slices.whole(local)
            continue
        own = shard(args, name, ranks, rank)
        parts = own.compact.parts if local.size(dim) == own.length else own.parts
        if sum(len(entries) for _, entries in parts) < local.size(dim):
            local.zero_()
        targets = [(entries, local.narrow(dim, position, len(entries))) for position, entries in parts]
        slices[name] = Slices(dim, targets, shapes[name])
    return slices


_MAX_BFLOAT16_BATCH = 2
"""Largest batch for which a CPU with AVX2 is faster in bfloat16 than in float32 (docs/performance.md)."""


def resolve_dtype(name: str, folder: str, device: torch.device, max_batch_size: int) -> torch.dtype:
    """The dtype to compute in. auto: the checkpoint's, or float32 where that is faster at this batch size."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    stored = stored_dtype(folder)
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
