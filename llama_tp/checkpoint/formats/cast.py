"""One dtype for all tensors of a checkpoint: that of its files, or the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import CheckpointReader, DerivedReader, TensorSource
from llama_tp.checkpoint.store.dcp import WeightsError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""By their names on the command line."""
_EMBEDDING = "tok_embeddings.weight"


def parse_dtype(name: str | None) -> torch.dtype | None:
    """ValueError for a name that is not in DTYPES. None: that of the files."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}; leave it out to keep the source's")
    return DTYPES[name]


def in_one_dtype(reader: CheckpointReader, dtype: torch.dtype | None) -> CheckpointReader:
    """The same model with all tensors but those of quantized layers in `dtype`. None: the dtype that all have,
    ValueError if they differ.

    Values are rounded to nearest, ties to even. A value beyond the range of `dtype` is a ValueError when it is read.
    """
    stored = reader.tensors[_EMBEDDING].dtype
    if dtype is None:
        if odd := [name for name, source in reader.tensors.items() if source.dtype != stored]:
            raise ValueError(
                f"{reader.files[0].parent}: {odd[0]} is {name_of(reader.tensors[odd[0]].dtype)}, but {_EMBEDDING} is "
                f"{name_of(stored)}: pass --dtype bfloat16, float16 or float32 to convert all tensors to one dtype"
            )
        return reader
    found = sorted({name_of(source.dtype) for source in reader.tensors.values()})
    return replace(
        DerivedReader.of(reader),
        dtype=dtype,
        tensors={name: CastTensor(name, source, dtype) for name, source in reader.tensors.items()},
        about={**reader.about, "source_dtype": ", ".join(found)},
    )


def name_of(dtype: torch.dtype) -> str:
    """As on the command line."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class CastTensor:
    """A TensorSource that converts what another one reads."""

    name: str
    source: TensorSource
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, dim: int, start: int, length: int) -> Tensor:
        stored = self.source.read(dim, start, length)
        values = stored.to(self.dtype)
        if torch.finfo(self.dtype).max < torch.finfo(stored.dtype).max:
            _check_range(self.name, stored, values)
        return values


def _check_range(name: str, stored: Tensor, values: Tensor) -> None:
    """WeightsError if a finite value became an infinity. NaN and infinity in the source are not judged here."""
    if _is_finite(values) or not _is_finite(stored):
        return
    largest, dtype = stored.abs().max().item(), name_of(values.dtype)
    raise WeightsError(
        f"{name} has a weight of magnitude {largest:g}, but {dtype} ends at {torch.finfo(values.dtype).max:g}: "
        f"pass --dtype {name_of(stored.dtype)}"
    )


def _is_finite(values: Tensor) -> bool:
    """torch.aminmax finds a NaN or an infinity in a fortieth of the time of torch.isfinite."""
    least, largest = torch.aminmax(values)
    return bool(least.isfinite() and largest.isfinite())
