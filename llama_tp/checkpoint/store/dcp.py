"""Write the served form: a PyTorch Distributed Checkpoint, which a plain `dcp.load` can read, and its table.

Every tensor is stored in chunks along its tensor-parallel dim (`chunks.chunk_bounds`), so that each rank, at any TP
size up to a limit, reads only its own bytes. Writing streams: a thread holds one chunk, and the tensor that it is
from if that is cut along its columns.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter

# The only private name: FileSystemReader locates chunks by objects of this class, which no public API creates.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageMeta, WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from llama_tp.checkpoint.formats.quantized import parameters_of
from llama_tp.checkpoint.formats.reader import CheckpointReader, TensorSource
from llama_tp.checkpoint.progress import Advance, no_progress
from llama_tp.checkpoint.store.chunks import DEFAULT_TP_MAX, chunk_bounds
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.manifest import FileEntry
from llama_tp.checkpoint.store.table import StoredChunk, StoredTensor, write_table
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.agreement import agree, gather
from llama_tp.parallel.sharding import tp_dim
from llama_tp.threads import num_workers

METADATA = ".metadata"
"""DCP's index of a checkpoint, a pickle: for PyTorch's reader only."""
FILE_BYTES = 1 << 29
"""A .distcp file is closed once it reaches this size."""
WHOLE_BYTES = 1 << 29
"""Limit for the tensors that are cut along their columns, of which each thread holds one in whole."""

T = TypeVar("T")


class WeightsError(ValueError):
    """The content read is invalid: an error of the reader or a file, not of the disk."""


def save(
    reader: CheckpointReader,
    folder: str | Path,
    *,
    tp_max: int = DEFAULT_TP_MAX,
    workers: int | None = None,
    advance: Advance = no_progress,
) -> dict[str, FileEntry]:
    """Write all tensors of `reader` into a folder as one checkpoint; every rank of the process group writes its share.

    At any tensor-parallel size up to `tp_max`, each rank will read only its own bytes. `workers` threads per rank read,
    hash and write; the bytes written do not depend on their number. Returns size and hash of the large files written by
    all ranks. `advance` gets this rank's bytes. ValueError on all ranks if any failed; the folder is then not a
    checkpoint.
    """
    parameters = parameters_of(reader)
    writer = _StreamingWriter(folder, workers or _bounded_workers(reader, parameters))
    with _one_line_errors(f"cannot write to {folder}"), _lean_writing():
        torch_dcp.save({}, storage_writer=writer, planner=_ReaderPlanner(reader.args, parameters, tp_max, advance))
    shares = gather((writer.files, writer.chunks))
    stored = {index: chunk for _, chunks in shares for index, chunk in chunks.items()}

    def write() -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            table = {name: _stored_tensor(reader.args, name, one, tp_max, stored) for name, one in parameters.items()}
            write_table(folder, table)

    agree(write)
    return {name: entry for files, _ in shares for name, entry in files.items()}


def _bounded_workers(reader: CheckpointReader, parameters: Mapping[str, TensorSource]) -> int:
    """Fewer than the default, but no fewer than two, if what the threads hold would be more than WHOLE_BYTES."""
    whole = [math.prod(one.shape) * one.dtype.itemsize for name, one in parameters.items() if tp_dim(name) == 1]
    # A matrix to quantize may have to be joined from shards: two bytes for each number.
    whole += [2 * math.prod(source.shape) for source in reader.quantized.values()]
    return min(num_workers(), max(2, WHOLE_BYTES // max(whole, default=1)))


Place = tuple[str, int]
"""A chunk: name of the tensor, first entry along its dim."""


def _stored_tensor(
    args: ModelArgs, name: str, source: TensorSource, tp_max: int, stored: dict[Place, tuple[str, int]]
) -> StoredTensor:
    bounds = chunk_bounds(args, name, source.shape, tp_max)
    chunks = tuple(StoredChunk(*stored[name, start], start, length) for start, length in bounds)
    return StoredTensor(source.dtype, tuple(source.shape), tp_dim(name) or 0, chunks)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One piece of one tensor."""

    name: str
    dim: int
    start: int
    length: int
    source: TensorSource

    @property
    def sizes(self) -> torch.Size:
        return torch.Size(self.length if dim == self.dim else size for dim, size in enumerate(self.source.shape))

    @property
    def offsets(self) -> torch.Size:
        return torch.Size(self.start if dim == self.dim else 0 for dim in range(len(self.source.shape)))

    @property
    def nbytes(self) -> int:
        return self.sizes.numel() * self.source.dtype.itemsize

    def write_item(self) -> WriteItem:
        return WriteItem(
            index=MetadataIndex(self.name, self.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(self.offsets, self.sizes),
                properties=TensorProperties(dtype=self.source.dtype),
                size=torch.Size(self.source.shape),
            ),
        )


def _chunks_of_rank(
    args: ModelArgs, parameters: Mapping[str, TensorSource], tp_max: int, rank: int, world_size: int
) -> list[_Chunk]:
    """Consecutive chunks, about the same number of bytes for each rank, so that sources are read in order."""
    chunks = [
        _Chunk(name, tp_dim(name) or 0, start, length, source)
        for name, source in parameters.items()
        for start, length in chunk_bounds(args, name, source.shape, tp_max)
    ]
    total = sum(chunk.nbytes for chunk in chunks)
    mine, done = [], 0
    for chunk in chunks:
        middle = done + chunk.nbytes / 2
        if int(middle * world_size / total) == rank:
            mine.append(chunk)
        done += chunk.nbytes
    return mine


class _ReaderPlanner(DefaultSavePlanner):
    """Plans the chunks of a reader instead of an in-memory state dict, and reads each just before it is written."""

    def __init__(self, args: ModelArgs, parameters: Mapping[str, TensorSource], tp_max: int, advance: Advance) -> None:
        super().__init__(flatten_state_dict=False)
        self.args = args
        self.parameters = parameters
        self.tp_max = tp_max
        self.advance = advance
        self.chunks: dict[MetadataIndex, _Chunk] = {}
        self.of_thread = threading.local()

    def create_local_plan(self) -> SavePlan:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        items = []
        for chunk in _chunks_of_rank(self.args, self.parameters, self.tp_max, rank, world_size):
            items.append(chunk.write_item())
            self.chunks[items[-1].index] = chunk
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one chunk, in the source's mapping or a buffer of this thread; valid until its next call."""
        chunk = self.chunks[write_item.index]
        self.advance(chunk.nbytes)
        try:
            piece = self._read(chunk)
        except ValueError as error:
            raise WeightsError(str(error)) from None
        _check_finite(chunk, piece)
        if not piece.is_contiguous():
            # Fresh memory would cost more than the copy: page faults alone take 2 s per GB (measured).
            buffer: Tensor | None = getattr(self.of_thread, "buffer", None)
            if buffer is None or buffer.nbytes < chunk.nbytes:
                self.of_thread.buffer = buffer = torch.empty(chunk.nbytes, dtype=torch.uint8)
            piece = buffer[: chunk.nbytes].view(piece.dtype).view(piece.shape).copy_(piece)
        return _exact_storage(piece)

    def _read(self, chunk: _Chunk) -> Tensor:
        if chunk.dim == 0:
            return chunk.source.read(0, chunk.start, chunk.length)
        # A source may have to compute all columns for some of them, so it is read once for all chunks.
        name, whole = getattr(self.of_thread, "whole", ("", None))
        if whole is None or name != chunk.name:
            self.of_thread.whole = None  # before the next one is read
            whole = chunk.source.read(0, 0, chunk.source.shape[0])
            self.of_thread.whole = chunk.name, whole
        return whole.narrow(chunk.dim, chunk.start, chunk.length)


def _check_finite(chunk: _Chunk, piece: Tensor) -> None:
    """torch.aminmax finds a NaN or an infinity in a fortieth of the time of torch.isfinite."""
    if not piece.is_floating_point():
        return
    least, largest = torch.aminmax(piece)
    if not (least.isfinite() and largest.isfinite()):
        raise WeightsError(
            f"{chunk.name} has non-finite weights (NaN or infinity) in entries {chunk.start} to "
            f"{chunk.start + chunk.length - 1} of dim {chunk.dim}: the originals are damaged, download them again"
        )


def _exact_storage(tensor: Tensor) -> Tensor:
    """The same memory as a storage of exactly its size, without a copy: torch.save writes a view's whole storage."""
    return torch.frombuffer(tensor.view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


class _StreamingWriter(FileSystemWriter):
    """DCP's writer, but each thread holds one chunk at a time instead of a rank's whole share."""

    def __init__(self, folder: str | Path, workers: int) -> None:
        super().__init__(folder)
        self.workers = workers
        self.files: dict[str, FileEntry] = {}
        self.chunks: dict[Place, tuple[str, int]] = {}
        """The file of each chunk, and where its bytes begin."""

    def storage_meta(self) -> StorageMeta | None:
        """None: DCP would record the temporary path and a random id, so equal checkpoints would differ."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shares = [(f"{plan.storage_data.prefix}{index}.distcp", items) for index, items in enumerate(_by_file(plan))]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="write") as pool:
            writing = [pool.submit(self._write_file, name, items, planner) for name, items in shares]
            try:
                return _finished([result for future in writing for result in future.result()])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with HashingFile(Path(self.path) / name) as file:
            for item in items:
                start = file.size
                recorder = _Recorder(file, cast(Tensor, planner.resolve_data(item)))
                torch.save(recorder.tensor, cast(IO[bytes], recorder))
                length = file.size - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                self.chunks[_place(item)] = name, recorder.offset
        self.files[name] = file.entry
        return results


def _by_file(plan: SavePlan) -> Iterator[list[WriteItem]]:
    items: list[WriteItem] = []
    size = 0
    for item in plan.items:
        assert item.tensor_data is not None
        items.append(item)
        size += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if size >= FILE_BYTES:
            yield items
            items, size = [], 0
    if items:
        yield items


def _place(item: WriteItem) -> Place:
    return item.index.fqn, max(item.index.offset or (0,))


class _Recorder:
    """Passes to a file what torch.save writes for one tensor, and notes where the tensor's bytes begin."""

    def __init__(self, file: HashingFile, tensor: Tensor) -> None:
        self.tensor = tensor
        self._file = file
        self._offset: int | None = None

    @property
    def offset(self) -> int:
        assert self._offset is not None, "torch.save has copied the tensor's memory"
        return self._offset

    def write(self, block: Any) -> int:
        if memoryview(block).nbytes == self.tensor.nbytes and _address(block) == self.tensor.data_ptr():
            self._offset = self._file.size
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()


def _address(block: Any) -> int:
    address: int = np.frombuffer(block, np.uint8).__array_interface__["data"][0]
    return address


def _finished(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


@contextmanager
def _lean_writing() -> Iterator[None]:
    """No zip checksums, which take a third of the time: the manifest has a sha256 of each file. And one thread for
    copies: the other cores hash and run the other ranks, and torch's threads spin while waiting for a core."""
    checksums, threads = get_crc32_options(), torch.get_num_threads()
    set_crc32_options(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        set_crc32_options(checksums)
        torch.set_num_threads(threads)


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Raise ValueError instead of DCP's report of all ranks' stacks; no warning about a missing process group."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (reason, _stack) = sorted(error.failures.items())[0]
        if not isinstance(reason, Exception):
            raise reason from None  # SystemExit or KeyboardInterrupt
        if isinstance(reason, WeightsError):
            raise ValueError(str(reason)) from None
        where = f" (rank {rank})" if dist.is_initialized() else ""
        line = (str(reason).splitlines() or [""])[0]
        raise ValueError(f"{what}{where}: {type(reason).__name__}: {line}") from None
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        raise ValueError(f"{what}: another rank exited: {str(error).splitlines()[0]}") from None
