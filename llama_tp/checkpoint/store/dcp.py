"""The served form: a PyTorch Distributed Checkpoint, which a plain `dcp.load` can also read.

Every tensor is stored in chunks along its tensor-parallel dim (`chunks.chunk_bounds`), so that each rank, at any TP
size up to a limit, reads only its own bytes. Writing streams: memory is bounded by one chunk. Reading rejects files
that do not match manifest.json, and unpickles only DCP's own classes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)

# The only private name: FileSystemReader locates chunks by objects of this class, which no public API creates.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageMeta, WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from llama_tp.checkpoint.formats.reader import CheckpointReader, TensorSource
from llama_tp.checkpoint.progress import Advance, no_progress
from llama_tp.checkpoint.store.chunks import DEFAULT_TP_MAX, chunk_bounds
from llama_tp.checkpoint.store.dcp_metadata import load_metadata
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.load_verification import LoadVerification
from llama_tp.checkpoint.store.manifest import FileEntry
from llama_tp.checkpoint.store.verify import verify
from llama_tp.checkpoint.torch_file import is_about_the_file, why_not_loaded
from llama_tp.parallel.agreement import agree, gather
from llama_tp.parallel.sharding import tp_dim

FILE_BYTES = 1 << 30
"""A .distcp file is closed once it reaches this size."""
LOAD_THREADS = 4
"""Concurrent reads, and concurrent hashes, over all ranks of a host: DCP's own reader has one thread."""

T = TypeVar("T")


class WeightsError(ValueError):
    """The content read is invalid: an error of the reader or a file, not of the disk."""


def save(
    reader: CheckpointReader, folder: str | Path, *, tp_max: int = DEFAULT_TP_MAX, advance: Advance = no_progress
) -> dict[str, FileEntry]:
    """Write all tensors of `reader` into a folder as one checkpoint; every rank of the process group writes its share.

    At any tensor-parallel size up to `tp_max`, each rank will read only its own bytes.
    Returns size and hash of the files written by all ranks. `advance` gets this rank's bytes. ValueError on all ranks
    if any failed; the folder is then not a checkpoint.
    """
    writer = _StreamingWriter(folder)
    with _one_line_errors(f"cannot write to {folder}"), _lean_writing():
        torch_dcp.save({}, storage_writer=writer, planner=_ReaderPlanner(reader, tp_max, advance))
    return {name: entry for entries in gather(writer.written) for name, entry in entries.items()}


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


def load(wanted: Mapping[str, Tensor | Slices], folder: str | Path, *, verify_files: str = "size") -> None:
    """Fill tensors on any device, in place; each rank reads only its own slices.

    `wanted` names every tensor of the checkpoint. Values are converted to the target's dtype. ValueError on all ranks:
    before reading, if the folder fails the quick check against its manifest, or names and shapes differ from `wanted`;
    after reading, if a hash differs. `verify_files` selects the files to hash: see `LoadVerification`.
    """
    slices = {name: one if isinstance(one, Slices) else Slices.whole(one) for name, one in wanted.items()}
    metadata = agree(lambda: _check_target(slices, folder))
    with agree(lambda: LoadVerification(folder, verify_files, num_threads=load_threads())) as verification:
        try:
            with _one_line_errors(f"cannot load {folder}"):
                torch_dcp.load({}, storage_reader=_VerifiedReader(folder, metadata), planner=_SlicePlanner(slices))
        except ValueError:
            verification.finish()  # report a damaged file by its hash rather than by where reading failed
            raise
        verification.finish()


def read_slice(folder: str | Path, metadata: Metadata, name: str, dim: int, start: int, length: int) -> Tensor:
    """`length` entries of a stored tensor along `dim`, on this process alone, in fresh memory.

    Holds the result and, per thread, one chunk. `metadata` is that of `read_metadata`: the files of the weights are not
    hashed here (see `LoadVerification`). ValueError for a file that cannot be read.
    """
    stored = tensors_of(metadata)[name]
    shape = tuple(stored.size)
    target = torch.empty(
        [length if at == dim else size for at, size in enumerate(shape)], dtype=stored.properties.dtype
    )
    planner = _SlicePlanner({name: Slices(dim, [(range(start, start + length), target)], shape)})
    with _one_line_errors(f"cannot read {folder}"):
        torch_dcp.load({}, storage_reader=_VerifiedReader(folder, metadata), planner=planner, no_dist=True)
    return target


def read_metadata(folder: str | Path) -> Metadata:
    """The tensors of a checkpoint and the locations of their chunks. ValueError if the folder fails the quick check."""
    manifest = verify(folder, full=False)
    return load_metadata(Path(folder), manifest.files.keys())


def checkpoint_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of the stored tensors."""
    return next(iter(tensors_of(read_metadata(folder)).values())).properties.dtype


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


def _chunks_of_rank(reader: CheckpointReader, tp_max: int, rank: int, world_size: int) -> list[_Chunk]:
    """Consecutive chunks, about the same number of bytes for each rank, so that sources are read in order."""
    chunks = [
        _Chunk(name, tp_dim(name) or 0, start, length, source)
        for name, source in reader.tensors.items()
        for start, length in chunk_bounds(reader.args, name, source.shape, tp_max)
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

    def __init__(self, reader: CheckpointReader, tp_max: int, advance: Advance) -> None:
        super().__init__(flatten_state_dict=False)
        self.reader = reader
        self.tp_max = tp_max
        self.advance = advance
        self.chunks: dict[MetadataIndex, _Chunk] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def create_local_plan(self) -> SavePlan:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        items = []
        for chunk in _chunks_of_rank(self.reader, self.tp_max, rank, world_size):
            items.append(chunk.write_item())
            self.chunks[items[-1].index] = chunk
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one chunk, in the source's mapping or a reused buffer; valid until the next call."""
        chunk = self.chunks[write_item.index]
        self.advance(chunk.nbytes)
        piece = chunk.source.read(chunk.dim, chunk.start, chunk.length)
        _check_finite(chunk, piece)
        if not piece.is_contiguous():
            # Fresh memory would cost more than the copy: page faults alone take 2 s per GB (measured).
            if self.buffer.nbytes < chunk.nbytes:
                self.buffer = torch.empty(chunk.nbytes, dtype=torch.uint8)
            piece = self.buffer[: chunk.nbytes].view(piece.dtype).view(piece.shape).copy_(piece)
        return _exact_storage(piece)


def _check_finite(chunk: _Chunk, piece: Tensor) -> None:
    """torch.aminmax finds a NaN or an infinity in a fortieth of the time of torch.isfinite."""
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
    """DCP's writer, but holding one chunk at a time instead of a rank's whole share."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.written: dict[str, FileEntry] = {}

    def storage_meta(self) -> StorageMeta | None:
        """None: DCP would record the temporary path and a random id, so equal checkpoints would differ."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        items = list(plan.items)
        while items:
            name = f"{plan.storage_data.prefix}{len(self.written)}.distcp"
            with HashingFile(Path(self.path) / name) as file:
                while items and file.size < FILE_BYTES:
                    results.append(_write_item(items.pop(0), planner, file))
            self.written[name] = file.entry
        return _finished(results)


def _write_item(item: WriteItem, planner: SavePlanner, file: HashingFile) -> WriteResult:
    start = file.size
    torch.save(planner.resolve_data(item), cast(IO[bytes], file))
    length = file.size - start
    return WriteResult(item.index, length, _StorageInfo(file.path.name, start, length))


def _finished(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


class _SlicePlanner(DefaultLoadPlanner):
    """Plans to read slices, where DCP plans what a DTensor holds: it knows of no uneven shares and of no copies."""

    def __init__(self, wanted: Mapping[str, Slices]) -> None:
        super().__init__(flatten_state_dict=False)
        self.wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = tensors_of(self.metadata)
        return LoadPlan([item for name, one in self.wanted.items() for item in _read_items(name, one, stored[name])])

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index.index
        assert index is not None
        _, target = self.wanted[read_item.dest_index.fqn].parts[index]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place already."""


def _read_items(name: str, wanted: Slices, stored: TensorStorageMetadata) -> Iterator[ReadItem]:
    """What to read of which chunk, and where to put it."""

    def at(size: torch.Size, value: int) -> torch.Size:
        return torch.Size(value if dim == wanted.dim else other for dim, other in enumerate(size))

    for index, (entries, _) in enumerate(wanted.parts):
        for chunk in stored.chunks:
            first = chunk.offsets[wanted.dim]
            start, stop = max(entries.start, first), min(entries.stop, first + chunk.sizes[wanted.dim])
            if start < stop:
                yield ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(name, index=index),
                    dest_offsets=at(chunk.offsets, start - entries.start),
                    storage_index=MetadataIndex(name, chunk.offsets),
                    storage_offsets=at(torch.Size([0] * len(chunk.sizes)), start - first),
                    lengths=at(chunk.sizes, stop - start),
                )


class _VerifiedReader(FileSystemReader):
    """Uses metadata that has been checked, and reads several files concurrently."""

    def __init__(self, folder: str | Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        plans = {name: replace(plan, items=items) for name, items in sorted(files.items())}
        with ThreadPoolExecutor(load_threads()) as pool:
            for future in [pool.submit(self._read_file, name, part, planner) for name, part in plans.items()]:
                future.result()
        return _finished(None)

    def _read_file(self, name: str, plan: LoadPlan, planner: LoadPlanner) -> None:
        try:
            super().read_data(plan, planner).wait()
        except Exception as error:
            if not is_about_the_file(error):
                raise
            raise WeightsError(f"{Path(self.path) / name} {why_not_loaded(error)}") from None


def load_threads() -> int:
    """This rank's share of the host's."""
    return max(1, LOAD_THREADS // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tensors_of(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """By name; `load_metadata` has checked that there is nothing else."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def _check_target(wanted: Mapping[str, Slices], folder: str | Path) -> Metadata:
    metadata = read_metadata(folder)
    assert not any(target.is_meta for one in wanted.values() for _, target in one.parts)
    check_shapes(metadata, {name: one.shape for name, one in wanted.items()}, folder)
    return metadata


def check_shapes(metadata: Metadata, wanted: Mapping[str, tuple[int, ...]], folder: str | Path) -> None:
    """ValueError unless the checkpoint has exactly these tensors."""
    stored = tensors_of(metadata)
    problems = [f"{name} is not in the checkpoint" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"{name} is in the checkpoint but not in the model" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        if (shape := tuple(stored[name].size)) != wanted[name]:
            problems.append(f"{name} has shape {shape} in the checkpoint, {wanted[name]} in the model")
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError(f"{folder} does not contain this model: {'; '.join(problems[:4])}{more}")


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
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says it better
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
