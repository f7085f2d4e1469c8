"""Whether the numbers in a file of a checkpoint are finite, seen block by block while the file is hashed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from llama_tp.checkpoint.store.table import StoredChunk, StoredTensor, Table


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes of a chunk of floating-point numbers in its file."""

    name: str
    tensor: StoredTensor
    chunk: StoredChunk

    @property
    def end(self) -> int:
        return self.chunk.offset + self.tensor.chunk_bytes(self.chunk)


class FiniteValues:
    """Looks at all floating-point numbers of one file: dense weights, and scales and offsets of quantized ones."""

    def __init__(self, table: Table, file: str) -> None:
        spans = _spans(table, file)
        self._spans = sorted(spans, key=lambda span: span.chunk.offset, reverse=True)
        self._rest = b""
        """The beginning of a number whose end is in the next block."""
        self.fault: str | None = None
        """The first number that is not finite: its tensor, its indices and what it is. None: there is none so far."""

    def look(self, offset: int, block: memoryview) -> None:
        """Look at the next block of the file, which begins at byte `offset`."""
        end = offset + len(block)
        while self._spans and self._spans[-1].chunk.offset < end and self.fault is None:
            span = self._spans[-1]
            start = max(offset, span.chunk.offset)
            self._look_at(span, start, block[start - offset : span.end - offset])
            if span.end > end:
                return
            self._spans.pop()

    def _look_at(self, span: _Span, start: int, part: memoryview) -> None:
        """`part` of a chunk begins at byte `start` of the file, perhaps within a number: chunks are not aligned."""
        itemsize = span.tensor.dtype.itemsize
        missing = (span.chunk.offset - start) % itemsize
        if missing:
            self._check(span, start + missing - itemsize, memoryview(bytearray(self._rest + bytes(part[:missing]))))
        size = (len(part) - missing) // itemsize * itemsize
        if size:
            self._check(span, start + missing, part[missing : missing + size])
        self._rest = bytes(part[missing + size :])

    def _check(self, span: _Span, start: int, part: memoryview) -> None:
        values = torch.frombuffer(part, dtype=span.tensor.dtype)
        # torch.aminmax finds a NaN or an infinity in a fortieth of the time of torch.isfinite.
        least, largest = torch.aminmax(values)
        if self.fault is not None or (least.isfinite() and largest.isfinite()):
            return
        first = int(values.isfinite().logical_not().nonzero()[0])
        flat = (start - span.chunk.offset) // values.itemsize + first
        indices = [int(index) for index in np.unravel_index(flat, span.tensor.chunk_shape(span.chunk))]
        indices[span.tensor.dim] += span.chunk.start
        self.fault = f"{span.name} is {values[first].item()} at {indices}"


def _spans(table: Table, file: str) -> Iterable[_Span]:
    for name, tensor in table.items():
        if tensor.dtype.is_floating_point:
            yield from (_Span(name, tensor, chunk) for chunk in tensor.chunks if chunk.file == file)
