"""Load this rank's model, as local modules, from a checkpoint folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from llama_tp.checkpoint.load_progress import LoadProgress
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.reading import Slices, StoredFiles, check_model, open_on_all_ranks
from llama_tp.model.linear import is_packed
from llama_tp.model.memory import empty
from llama_tp.model.transformer import Transformer, TransformerBlock
from llama_tp.model.weights import FUSED, PACKED, Layout
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree
from llama_tp.parallel.apply import hold_shards, localize, parallelize
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
    layout: Layout = PACKED,
) -> Transformer:
    """Load this rank's share of a checkpoint in `dtype` onto its device, ready to compute.

    ValueError, on every rank, if the folder does not match its manifest or this model, or the model cannot be split
    over these ranks. No rank ever holds the whole model, nor its own share twice.

    `ranks`: the shares; None: equal ones. `layout`: of linear layers on CPUs.
    """
    ranks = group.comm.size if ranks is None else ranks
    model = empty_model(args, group, dtype, ranks)
    with open_on_all_ranks(folder) as files:
        agree(lambda: check_model(files, args))
        hold_shards(model, ranks, group.comm.rank, files.formats)
        with agree(lambda: LoadVerification(folder, verify_files)) as verification:
            with verification.explaining():
                loader = agree(lambda: _Loader(model, files, group, dtype, ranks, layout))
                agree(lambda: localize(model, group.comm, files.formats, ranks, loader, layout))
            verification.finish()
    return model


def empty_model(args: ModelArgs, group: Group, dtype: torch.dtype, ranks: Ranks) -> Transformer:
    """The model on the meta device, parallelized over the group. ValueError if it cannot be split over these ranks."""
    check_tp_size(args, ranks)
    with torch.device("meta"):
        model = Transformer(args).to(dtype).requires_grad_(False).eval()
    if group.mesh is not None:
        parallelize(model, group.mesh, ranks)
    return model


def parts_of(model: Transformer) -> list[tuple[str, nn.Module]]:
    """The parts of a model with their names, in the order in which `localize` uses them."""
    layers = [(f"layers.{index}", layer) for index, layer in enumerate(model.layers)]
    parts = [("tok_embeddings", model.tok_embeddings), *layers, ("norm", model.norm)]
    return parts if model.args.tied_embeddings else [*parts, ("output", model.output)]


class _Loader:
    """Fills the parts of a model on the meta device from a checkpoint, in order: each while the one before it is being
    localized. Sharded parameters become this rank's local tensors."""

    def __init__(
        self,
        model: Transformer,
        files: StoredFiles,
        group: Group,
        dtype: torch.dtype,
        ranks: Ranks,
        layout: Layout,
    ) -> None:
        self._args = model.args
        self._files = files
        self._group = group
        self._ranks = ranks
        # Packing copies a matrix. One that is not packed stays where it is read to.
        self._packs = layout == PACKED and is_packed(group.device, dtype)
        self._spare = deque([self._fresh(0), self._fresh(0)])
        parts = parts_of(model)
        self._sizes = {name: sum(one.nbytes for one in part.parameters()) for name, part in parts}
        self._progress = LoadProgress(sum(self._sizes.values())) if group.comm.rank == 0 else None
        self._parts = iter(parts)
        self._start_next()

    def __call__(self, part: nn.Module) -> None:
        """Wait until the next part is filled, which must be `part`."""
        assert part is self._part
        for future in self._reading:
            future.result()
        if self._progress is not None:
            self._progress.advance(self._sizes[self._name])
        self._start_next()

    def _start_next(self) -> None:
        if (one := next(self._parts, None)) is not None:
            self._name, self._part = one
            self._materialize(self._part, self._name)
            self._reading = self._files.start(self._slices(self._part, self._name))

    def _materialize(self, part: nn.Module, prefix: str) -> None:
        """Give a part local tensors on the device, with matrices that become one linear layer next to each other."""
        parameters = list(part.named_parameters())
        packed = {name for name, one in parameters if one.dim() > 1 and self._is_packed(part, f"{prefix}.{name}")}
        place(part, [one for one in parameters if one[0] in packed], self._memory)
        place(part, [one for one in parameters if one[0] not in packed], self._fresh)

    def _slices(self, part: nn.Module, prefix: str) -> dict[str, Slices]:
        """Where the weights of a part go. What is padding becomes zero."""
        slices = {}
        for relative, parameter in part.named_parameters():
            name, local = f"{prefix}.{relative}", parameter.detach()
            shape = self._files.tensors[name].shape
            if (dim := tp_dim(name)) is None:
                slices[name] = Slices.whole(local)
                continue
            parts = shard(self._args, name, self._ranks, self._group.comm.rank, shape[dim]).compact.parts
            if sum(len(entries) for _, entries in parts) < local.size(dim):
                local.zero_()
            targets = [(entries, local.narrow(dim, position, len(entries))) for position, entries in parts]
            slices[name] = Slices(dim, targets, shape)
        return slices

    def _is_packed(self, part: nn.Module, name: str) -> bool:
        """Whether a matrix is a dense layer's, of which localizing keeps a packed copy."""
        is_dense = name.rpartition(".")[0] not in self._files.formats
        return self._packs and isinstance(part, TransformerBlock) and is_dense

    def _memory(self, size: int) -> Tensor:
        """Memory for matrices that are packed next. That for the last part but one is free again: fresh memory costs
        more than reading into it."""
        memory = self._spare.popleft()
        if memory.nbytes < size:
            memory = self._fresh(size)
        self._spare.append(memory)
        return memory

    def _fresh(self, size: int) -> Tensor:
        return empty((size,), torch.uint8, self._group.device)


def place(part: nn.Module, parameters: Iterable[tuple[str, Tensor]], allocate: Callable[[int], Tensor]) -> None:
    """Replace parameters on the meta device by tensors in memory that is allocated for them: all matrices in one piece,
    with those that are computed as one next to each other."""
    ordered = sorted(parameters, key=_neighbours)
    _place([one for one in ordered if one[1].dim() > 1], part, allocate)
    for vector in (one for one in ordered if one[1].dim() == 1):
        _place([vector], part, allocate)  # alone: it may be kept for longer than the matrices


def _place(parameters: Sequence[tuple[str, Tensor]], part: nn.Module, allocate: Callable[[int], Tensor]) -> None:
    sizes = [_aligned(parameter.nbytes) for _, parameter in parameters]
    places = allocate(sum(sizes))[: sum(sizes)].split(sizes)
    for (name, parameter), memory in zip(parameters, places, strict=True):
        tensor = memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        owner, _, kind = name.rpartition(".")
        part.get_submodule(owner).register_parameter(kind, nn.Parameter(tensor, requires_grad=False))


_ALIGNMENT = 64
"""Bytes: of vector loads, and of any dtype."""
_FUSED = [layer.rpartition(".")[2] for group in FUSED for layer in group]


def _neighbours(parameter: tuple[str, Tensor]) -> tuple[str, int]:
    """A sort key: parameters that are concatenated follow each other."""
    layer, kind = f".{parameter[0]}".split(".")[-2:]
    return kind, _FUSED.index(layer) if layer in _FUSED else len(_FUSED)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_MAX_BFLOAT16_BATCH = 2
"""Largest batch for which a CPU with AVX2 is faster in bfloat16 than in float32 (docs/performance.md)."""


def resolve_dtype(name: str, stored: torch.dtype, device: torch.device, max_batch_size: int) -> torch.dtype:
    """The dtype to compute in. auto: that of the checkpoint, `stored`, or float32 where that is faster at this batch
    size."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
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
