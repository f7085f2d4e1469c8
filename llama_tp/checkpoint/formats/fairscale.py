"""Meta's own format: consolidated.00.pth to consolidated.NN.pth, the shards of fairscale's model parallelism.

Column-parallel weights and `output` are split on dim 0, row-parallel ones on dim 1; the embedding on the hidden dim
(Llama 2) or on the vocabulary (Llama 3); norms are in every shard. The files are memory-mapped, never read as a
whole, and never unpickled without restriction.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.checklist import check_original, expected_md5s, listed_shards
from llama_tp.checkpoint.formats.params import PARAMS, read_params
from llama_tp.checkpoint.formats.reader import QuantizedSource, TensorSource, blocks_of_rows
from llama_tp.checkpoint.torch_file import check_torch_file, why_not_loaded
from llama_tp.file_kind import check_link, describe_model_folder, describe_weights, shown
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import tp_dim

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COMPARED_ELEMENTS = 2048


class FairscaleReader:
    """A CheckpointReader of Meta's shards. The constructor checks everything except the values.

    ValueError, one line, names the file, the tensor, what was found and what was expected.
    """

    def __init__(self, folder: str | Path, model_parallel_size: int | None = None) -> None:
        """`model_parallel_size`: the required number of shards; None: any."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder: it should hold Meta's params.json and consolidated.*.pth")
        is_there = (self.folder / PARAMS).exists() or any(self.folder.glob("consolidated.*.pth"))
        if not is_there:
            if found := describe_model_folder(self.folder):
                raise ValueError(f"{self.folder} has no params.json: it {found}")
            forms = "consolidated.*.pth with params.json, *.safetensors with config.json, nor a GGUF file"
            raise ValueError(f"{self.folder} holds no model: there are neither {forms}")
        check_link(self.folder, self.folder / PARAMS)
        check_original(self.folder / PARAMS)
        args = read_params(self.folder / PARAMS)
        md5s = expected_md5s(self.folder)
        self.files = paths = _shard_paths(self.folder, model_parallel_size, listed_shards(md5s))
        _check_divisible(args, len(paths))
        self.expected_md5s: Mapping[Path, frozenset[str]] = {
            path: md5s[path.name] for path in paths if path.name in md5s
        }
        self.about: Mapping[str, Any] = {"source": "fairscale", "model_parallel_size": len(paths)}
        shards = {path: _open_shard(path) for path in paths}
        first = shards[paths[0]]
        embedding_dim, rows = _embedding_split(args, paths[0], first, len(paths))
        try:
            args = args.with_vocab_size(rows)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        self.args = ModelArgs.from_params({**args.to_dict(), "tied_embeddings": OUTPUT not in first})
        self.dtype = first[EMBEDDING].dtype
        self.quantized: Mapping[str, QuantizedSource] = {}
        self.tensors: Mapping[str, TensorSource] = _join(self.args, shards, embedding_dim)


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A TensorSource over shards of equal size, in rank order, split on dim `split` (None: all the same)."""

    shards: list[Tensor]
    split: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(
            size * len(self.shards) if dim == self.split else size for dim, size in enumerate(self.shards[0].shape)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        if self.split is None:
            return self.shards[0].narrow(dim, start, length)
        if dim != self.split:
            pieces = [shard.narrow(dim, start, length) for shard in self.shards]
        else:
            pieces = self._pieces(dim, start, start + length)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.split)

    def _pieces(self, dim: int, start: int, end: int) -> list[Tensor]:
        width = self.shards[0].shape[dim]
        pieces = []
        for rank in range(start // width, -(-end // width)):
            low, high = max(start, rank * width), min(end, (rank + 1) * width)
            pieces.append(self.shards[rank].narrow(dim, low - rank * width, high - low))
        return pieces


@dataclass(frozen=True, slots=True)
class SliceOfTensor:
    """What one shard holds of a tensor."""

    source: TensorSource
    dim: int
    start: int
    length: int

    @classmethod
    def of_rank(cls, name: str, source: TensorSource, rank: int, ranks: int, embedding_dim: int) -> SliceOfTensor:
        """ValueError if the tensor cannot be split over that many ranks."""
        dim = embedding_dim if name == EMBEDDING else tp_dim(name)
        if dim is None:
            return cls(source, 0, 0, source.shape[0])
        size, rest = divmod(source.shape[dim], ranks)
        if rest:
            raise ValueError(
                f"{name} of shape {source.shape} cannot be split on dim {dim} for model_parallel_size={ranks}"
            )
        return cls(source, dim, rank * size, size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.source.shape))

    def blocks(self) -> Iterator[Tensor]:
        """The rows in order, a few at a time; all rows at once if only some of their columns are wanted."""
        if self.dim == 0:
            yield from blocks_of_rows(self.source, self.start, self.length)
        elif self.length == self.source.shape[self.dim]:
            yield from blocks_of_rows(self.source, 0, self.source.shape[0])
        else:
            yield self.source.read(self.dim, self.start, self.length)


def _shard_paths(folder: Path, model_parallel_size: int | None, listed: list[str]) -> list[Path]:
    """consolidated.00.pth and so on, in order. ValueError if any of `listed` is missing, or their number is not
    model_parallel_size."""
    found = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    if not found:
        raise ValueError(f"{folder} holds no consolidated.*.pth: these are not Meta's original weights")
    if odd := [name for name in found if not re.fullmatch(r"consolidated\.\d\d\.pth", name)]:
        raise ValueError(
            f"{folder / odd[0]} is not a shard: shards are named consolidated.00.pth, consolidated.01.pth, ..."
        )
    count = int(max([*found, *listed]).split(".")[1]) + 1
    if missing := [name for name in map("consolidated.{:02d}.pth".format, range(count)) if name not in found]:
        raise ValueError(f"{folder / missing[0]} is missing, found {', '.join(found[:4])}: download it again")
    if model_parallel_size not in (None, count):
        raise ValueError(
            f"model_parallel_size={model_parallel_size} but {folder} holds {count} shard{'s' if count > 1 else ''}: "
            f"pass --model_parallel_size {count}, or find the other shards"
        )
    return [folder / name for name in found]


def _check_divisible(args: ModelArgs, model_parallel_size: int) -> None:
    if model_parallel_size < 1:
        raise ValueError(f"model_parallel_size={model_parallel_size} must be at least 1")
    for name in ("n_heads", "n_kv_heads", "hidden_dim"):
        if getattr(args, name) % model_parallel_size:
            raise ValueError(
                f"model_parallel_size={model_parallel_size} does not divide {name}={getattr(args, name)} of params.json"
            )


def _open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one .pth, mapped from the file. Nothing in it is executed."""
    check_link(path.parent, path)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; download it again")
    if problem := describe_weights(path):
        raise ValueError(f"{path} {problem}")
    try:
        check_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}; download it again") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle; the error is clearer
            entries = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A broken or hostile file can make the reader fail in any way.
    except Exception as error:
        raise ValueError(f"{path} {why_not_loaded(error)}; download it again") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a dict of tensors")
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {shown(repr(name))} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {shown(name)} is {value.dtype}, {value.layout}; expected dense bfloat16, float16 or float32"
            )
        if value.untyped_storage().nbytes() < value.nbytes:
            raise ValueError(f"{path}: {shown(name)} claims {value.nbytes} bytes, more than the file holds for it")
    # Rotary frequencies are computed from params.json.
    shard = {str(name): value for name, value in entries.items() if not str(name).endswith("rope.freqs")}
    if EMBEDDING in shard and OUTPUT in shard and _is_same(shard[EMBEDDING], shard[OUTPUT]):
        del shard[OUTPUT]
    return shard


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Whether two names of a file stand for one tensor in it, as where embeddings are tied."""
    return one.shape == two.shape and one.stride() == two.stride() and one.data_ptr() == two.data_ptr()


def _embedding_split(args: ModelArgs, path: Path, shard: Mapping[str, Tensor], ranks: int) -> tuple[int, int]:
    """(dim that the embedding is split on, rows of the full embedding), from the width of one shard."""
    if EMBEDDING not in shard:
        raise ValueError(f"{path}: {EMBEDDING} is missing")
    shape = tuple(shard[EMBEDDING].shape)
    if len(shape) == 2 and shape[1] == args.dim:
        return 0, shape[0] * ranks
    if len(shape) == 2 and shape[1] * ranks == args.dim:
        return 1, shape[0]
    raise ValueError(
        f"{path}: {EMBEDDING} has shape {shape}, expected (rows, {args.dim}) or (rows, {args.dim // ranks}) "
        f"for dim={args.dim} of params.json and model_parallel_size={ranks}"
    )


def _join(args: ModelArgs, shards: Mapping[Path, Mapping[str, Tensor]], embedding_dim: int) -> dict[str, ShardedTensor]:
    shapes = weight_shapes(args)
    first = next(iter(shards.values()))
    joined: dict[str, ShardedTensor] = {}
    for path, shard in shards.items():
        _check_names(path, shard, shapes)
    for name, shape in shapes.items():
        split = embedding_dim if name == EMBEDDING else tp_dim(name)
        expected = tuple(size // len(shards) if dim == split else size for dim, size in enumerate(shape))
        for path, shard in shards.items():
            found = shard[name]
            if tuple(found.shape) != expected:
                raise ValueError(f"{path}: {name} has shape {tuple(found.shape)}, expected {expected} from params.json")
            if found.dtype != first[name].dtype:
                raise ValueError(f"{path}: {name} is {found.dtype}, expected {first[name].dtype} as in shard 0")
        source = ShardedTensor([shard[name] for shard in shards.values()], split)
        if split is None:
            _check_replicas(name, source, list(shards))
        joined[name] = source
    _check_distinct(joined, list(shards))
    return joined


def _check_names(path: Path, shard: Mapping[str, Tensor], shapes: Mapping[str, object]) -> None:
    for what, names in (("missing", shapes.keys() - shard.keys()), ("unexpected", shard.keys() - shapes.keys())):
        if names:
            listed = ", ".join(map(shown, sorted(names)[:4])) + (", ..." if len(names) > 4 else "")
            raise ValueError(
                f"{path}: {len(names)} tensor(s) {what}: {listed}; expected those of params.json, n_layers included"
            )


def _check_replicas(name: str, source: ShardedTensor, paths: list[Path]) -> None:
    """Norms are the same in every shard. If they differ widely, the shards are from different models."""
    first = source.shards[0].float()
    for path, shard in zip(paths, source.shards, strict=True):
        if not torch.allclose(first, shard.float(), rtol=0.1, atol=0.1, equal_nan=True):
            raise ValueError(f"{path}: {name} differs from {paths[0].name}'s: the shards are from different models")


def _check_distinct(tensors: Mapping[str, ShardedTensor], paths: list[Path]) -> None:
    """The same shard under two names would give a model that runs and talks nonsense.

    Reads the first elements of one tensor, and of the next only while shards are identical in all before it.
    """
    alike = [list(range(len(paths)))]
    for tensor in tensors.values():
        if tensor.split is not None:
            alike = [group for ranks in alike for group in _group_by_first_elements(tensor, ranks) if len(group) > 1]
    if alike:
        first, second, *_ = alike[0]
        raise ValueError(
            f"{paths[second]} holds the same weights as {paths[first].name}: it is not shard {second} of this model, "
            "download it again"
        )


def _group_by_first_elements(tensor: ShardedTensor, ranks: list[int]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for rank in ranks:
        elements = tensor.shards[rank].flatten()[:_COMPARED_ELEMENTS]
        groups.setdefault(elements.view(torch.uint8).numpy().tobytes(), []).append(rank)
    return list(groups.values())
