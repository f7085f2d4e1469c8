"""Read the tensors of a checkpoint: each byte that is wanted once, in several threads, straight into its target."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llama_tp.checkpoint.memory import RecycledMemory
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.manifest import MANIFEST, manifest_digest
from llama_tp.checkpoint.store.table import StoredChunk, StoredTensor, check_shapes, dtype_name, load_table
from llama_tp.checkpoint.store.verify import verify
from llama_tp.model.weights import WeightFormats, formats_of, parameter_shapes, weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree, gather
from llama_tp.threads import num_io_threads

_PIECE = 8 << 20
"""Bytes of one read: enough for a disk's full speed, and little enough that threads share a large tensor."""


@dataclass(frozen=True, slots=True)
class Slices:
    """A part of a stored tensor: `parts` says which of its entries along `dim` go into which tensor."""

    dim: int
    parts: Sequence[tuple[range, Tensor]]
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @classmethod
    def whole(cls, target: Tensor) -> Slices:
        return cls(0, [(range(target.size(0)), target)], tuple(target.shape))


class StoredFiles:
    """The tensors of a checkpoint. ValueError if the folder fails the quick check against its manifest.

    What is read is verified only by a `LoadVerification` beside it. The threads that read live as long as the context;
    outside of it, as long as one `read`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = verify(folder, full=False)
        self.tensors = load_table(folder, self.manifest)
        self.memory = RecycledMemory()
        self._scratch = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors that are not quantized."""
        return self.tensors["tok_embeddings.weight"].dtype

    @property
    def formats(self) -> WeightFormats:
        """Of the quantized linear layers."""
        return formats_of({name: dtype_name(tensor.dtype) for name, tensor in self.tensors.items()})

    def __enter__(self) -> StoredFiles:
        self._torch_threads = torch.get_num_threads()
        # Each reading thread also converts and copies alone: the other cores have other threads.
        self._pool = ThreadPoolExecutor(
            num_io_threads(), thread_name_prefix="read", initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = None
        torch.set_num_threads(self._torch_threads)  # the last setting is the default of new threads

    def start(self, wanted: Mapping[str, Slices]) -> list[Future[None]]:
        """Inside the context: begin to fill targets on any device, in the order of the files, converting values to
        their dtype."""
        assert self._pool is not None
        pieces = [piece for name, slices in wanted.items() for piece in _pieces(self.tensors[name], slices)]
        return [self._pool.submit(self._read, piece) for piece in sorted(pieces, key=lambda one: one[:2])]

    def read(self, wanted: Mapping[str, Slices]) -> None:
        """Fill targets. ValueError for a file that cannot be read."""
        with nullcontext() if self._pool is not None else self:
            for future in self.start(wanted):
                future.result()

    def _read(self, piece: _Piece) -> None:
        target = piece.target
        if piece.is_whole and target.dtype == piece.dtype and target.device.type == "cpu" and target.is_contiguous():
            self._fill(target, piece)
            return
        shape = (target.size(0), *piece.row_shape)
        nbytes = math.prod(shape) * piece.dtype.itemsize
        scratch = self._scratch_of(nbytes, target)[:nbytes].view(piece.dtype).view(shape)
        self._fill(scratch, piece)
        if not piece.is_whole:
            scratch = scratch.narrow(1, piece.columns.start, len(piece.columns))
        target.copy_(scratch)

    def _scratch_of(self, nbytes: int, target: Tensor) -> Tensor:
        """Memory of this thread; pinned for a GPU."""
        scratch: Tensor | None = getattr(self._scratch, "tensor", None)
        if scratch is None or scratch.nbytes < nbytes:
            scratch = torch.empty(max(nbytes, _PIECE), dtype=torch.uint8, pin_memory=target.is_cuda)
            self._scratch.tensor = scratch
        return scratch

    def _fill(self, target: Tensor, piece: _Piece) -> None:
        memory, path = memoryview(cast(Any, target.flatten().view(torch.uint8).numpy())), self.folder / piece.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(piece.offset)
                while len(memory):
                    if not (count := file.readinto(memory)):
                        raise ValueError(f"{path} was truncated while it was read")
                    memory = memory[count:]
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error


def check_model(files: StoredFiles, args: ModelArgs) -> None:
    """ValueError unless the checkpoint holds exactly this model."""
    check_shapes(files.tensors, parameter_shapes(args, files.formats), files.folder)
    shapes = weight_shapes(args)
    for module, one in files.formats.items():
        for kind, (_, dtype) in one.parameters(*shapes[f"{module}.weight"]).items():
            if (found := dtype_name(files.tensors[f"{module}.{kind}"].dtype)) != dtype:
                raise ValueError(f"{files.folder}: {module}.{kind} is {found}, expected {dtype} for {one.name}")


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of a checkpoint's tensors."""
    return StoredFiles(folder).dtype


def open_on_all_ranks(folder: str | Path) -> StoredFiles:
    """Open the same checkpoint on every rank. ValueError on all, if it is not sound or not the same everywhere."""
    files = agree(lambda: StoredFiles(folder))
    digests = gather(manifest_digest(folder))
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(
            f"{folder} is not the same checkpoint on all hosts: {MANIFEST} of rank {others[0]} differs from that of "
            "rank 0; copy the folder again"
        )
    return files


def load(wanted: Mapping[str, Tensor | Slices], folder: str | Path, *, verify_files: str = "size") -> None:
    """Fill tensors, in place; each rank reads only its own slices.

    `wanted` names every tensor of the checkpoint. ValueError on all ranks: before reading, if the folder fails the
    quick check against its manifest, or names and shapes differ from `wanted`; after reading, if a hash differs.
    `verify_files` selects the files to hash: see `LoadVerification`.
    """
    slices = {name: one if isinstance(one, Slices) else Slices.whole(one) for name, one in wanted.items()}

    with open_on_all_ranks(folder) as files:
        agree(lambda: check_shapes(files.tensors, {name: one.shape for name, one in slices.items()}, folder))
        with agree(lambda: LoadVerification(folder, verify_files)) as verification:
            with verification.explaining():
                agree(lambda: files.read(slices))
            verification.finish()


class _Piece(NamedTuple):
    """Adjacent rows of a chunk, all of their columns or some."""

    file: str
    offset: int
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    """Of a row in the file."""
    columns: range
    """Of a matrix: those wanted of each row."""
    target: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether all columns are wanted."""
        return not self.row_shape or len(self.columns) == self.row_shape[0]


def _pieces(stored: StoredTensor, wanted: Slices) -> Iterator[_Piece]:
    for entries, target in wanted.parts:
        for chunk in stored.chunks:
            box = [range(size) for size in stored.chunk_shape(chunk)]
            if wanted.dim == stored.dim:
                start, stop = max(entries.start, chunk.start), min(entries.stop, chunk.start + chunk.length)
                if start >= stop:
                    continue
                box[wanted.dim] = range(start - chunk.start, stop - chunk.start)
                part = target.narrow(wanted.dim, start - entries.start, stop - start)
            else:
                box[wanted.dim] = entries
                part = target.narrow(stored.dim, chunk.start, chunk.length)
            yield from _rows(stored, chunk, box, part)


def _rows(stored: StoredTensor, chunk: StoredChunk, box: Sequence[range], target: Tensor) -> Iterator[_Piece]:
    """The box of a chunk, a few rows at a time."""
    row_shape = stored.chunk_shape(chunk)[1:]
    row_bytes = math.prod(row_shape) * stored.dtype.itemsize
    step = max(1, _PIECE // row_bytes)
    columns = box[1] if len(box) > 1 else range(1)
    for first in range(0, len(box[0]), step):
        rows = target[first : first + step]
        offset = chunk.offset + (box[0].start + first) * row_bytes
        yield _Piece(chunk.file, offset, stored.dtype, row_shape, columns, rows)
