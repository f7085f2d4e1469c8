"""Writes a file of torch.save tensor after tensor: torch.save itself takes all tensors of a file at once.

torch.save gets placeholders, tensors whose memory is never touched. In the stream that it writes, a zip archive, the
bytes of each are replaced by those of the tensor. The archive's checksums, which torch.save leaves out, are filled in:
they follow the bytes of an entry, and are repeated in the directory at the end
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.9 and 4.3.12).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from llama_tp.checkpoint.formats.safetensors_writer import Layout
from llama_tp.checkpoint.store.hashing_file import HashingFile

_ALIGNMENT = 64
_LOCAL_HEADER, _DIRECTORY_HEADER = b"PK\x03\x04", b"PK\x01\x02"
_LOCAL_HEADER_BYTES = 30
"""Followed by the entry's name and extra fields, whose lengths are its last four bytes. Then come one block with the
data, and one with the checksum."""


def write_torch_file(
    file: HashingFile,
    layouts: Mapping[str, Layout],
    blocks: Callable[[str], Iterable[Tensor]],
    same: Mapping[str, str],
) -> None:
    """Write a dict of tensors. Holds one block.

    blocks: the rows of a tensor in order, in pieces of whatever size
    same: names that stand for a tensor of `layouts`, which is stored once
    """
    placeholders = _placeholders(layouts)
    names = {tensor.data_ptr(): name for name, tensor in placeholders.items()}
    stream = _Stream(file, lambda address: blocks(names[address]) if address in names else None)
    checksums = get_crc32_options()
    set_crc32_options(False)
    try:
        entries = placeholders | {name: placeholders[other] for name, other in same.items()}
        torch.save(entries, cast(IO[bytes], stream))
    except BaseException:
        # torch.save continues after an error in the stream, and then reports something else.
        if stream.error is not None:
            raise stream.error from None
        raise
    finally:
        set_crc32_options(checksums)
    assert stream.is_complete, "torch.save writes its archive in another way"


def _placeholders(layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Overlapping tensors with distinct addresses. Their memory is reserved, but never touched."""
    largest = max(layout.nbytes for layout in layouts.values())
    memory = torch.empty(largest + _ALIGNMENT * len(layouts), dtype=torch.uint8).numpy()
    placeholders = {}
    for index, (name, layout) in enumerate(layouts.items()):
        start = _ALIGNMENT * index
        flat = torch.frombuffer(memory[start : start + layout.nbytes], dtype=layout.dtype)
        placeholders[name] = flat.view(layout.shape)
    return placeholders


class _Stream:
    """The file that torch.save writes to."""

    def __init__(self, file: HashingFile, blocks_at: Callable[[int], Iterable[Tensor] | None]) -> None:
        self.error: BaseException | None = None
        self.is_complete = False
        """Whether every entry of the directory got its checksum."""
        self._file = file
        self._blocks_at = blocks_at
        self._state: Literal["header", "name", "data", "checksum"] = "header"
        """What comes next."""
        self._before_data = 0
        self._checksum = 0
        self._checksums: list[int] = []

    def write(self, block: Any) -> int:
        try:
            if self.error is not None:
                raise self.error
            return self._write(memoryview(block).cast("B"))
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def _write(self, block: memoryview) -> int:
        if self._state == "data":
            self._write_data(block)
            self._state = "checksum"
        elif self._state == "checksum":
            self._checksums.append(self._checksum)
            self._file.write(block[:4].tobytes() + struct.pack("<I", self._checksum) + block[8:].tobytes())
            self._state = "header"
        elif self._state == "name":
            self._file.write(block)
            self._before_data -= len(block)
        elif block[:4] == _LOCAL_HEADER:
            assert len(block) == _LOCAL_HEADER_BYTES
            self._file.write(block)
            self._before_data = sum(struct.unpack_from("<HH", block, 26))
            self._state = "name"
        else:
            self._file.write(self._completed(bytearray(block)) if block[:4] == _DIRECTORY_HEADER else block)
        if self._state == "name" and self._before_data == 0:
            self._state = "data"
        return len(block)

    def _write_data(self, block: memoryview) -> None:
        self._checksum, size = 0, 0
        blocks = self._blocks_at(_address(block)) if len(block) else None
        for piece in [block] if blocks is None else map(_bytes_of, blocks):
            self._checksum = zlib.crc32(piece, self._checksum)
            self._file.write(piece)
            size += len(piece)
        assert size == len(block)

    def _completed(self, directory: bytearray) -> bytearray:
        position = 0
        for checksum in self._checksums:
            assert directory[position : position + 4] == _DIRECTORY_HEADER
            struct.pack_into("<I", directory, position + 16, checksum)
            position += 46 + sum(struct.unpack_from("<HHH", directory, position + 28))
        self.is_complete = position == len(directory)
        return directory


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.contiguous().flatten().view(torch.uint8).numpy()))


def _address(block: memoryview) -> int:
    address: int = np.frombuffer(block, np.uint8).__array_interface__["data"][0]
    return address
