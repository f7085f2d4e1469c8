"""A GGUF header, walked before it is believed: the gguf package loops as often as a file says, on any file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from llama_tp.file_kind import read_head, why_no_content

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_KEYS = 4096
_MAX_TENSORS = 1 << 16
_MAX_ELEMENTS = 1 << 21
"""Array elements of all metadata together: a vocabulary of 256k has 0.8 million (tokens, types, merges)."""


def check_header(path: Path) -> None:
    """ValueError if the file is no GGUF (version 2 or 3, little-endian), or a count in it points beyond its end."""
    try:
        if problem := why_no_content(read_head(path)):
            raise ValueError(f"it {problem}")
        with path.open("rb") as file:
            _Walk(file, os.fstat(file.fileno()).st_size).header()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a sound GGUF file: {error}") from None


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.elements = 0

    def header(self) -> None:
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"version {version} is not supported, 2 and 3 are")
        tensors, keys = self.number("Q"), self.number("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise ValueError(f"{tensors} tensors and {keys} metadata keys are too many")
        for _ in range(keys):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.string()
            if (dims := self.number("I")) > 4:
                raise ValueError(f"a tensor of {dims} dims")
            self.skip(8 * dims + 4 + 8)

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array()
        else:
            self.skip(_bytes_of(kind))

    def array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise ValueError(f"its metadata has more than {_MAX_ELEMENTS} array elements")
        if kind != _STRING:
            self.skip(_bytes_of(kind) * count)
            return
        for _ in range(count):
            self.string()

    def string(self) -> None:
        self.skip(self.number("Q"))

    def number(self, code: str) -> int:
        size = struct.calcsize("<" + code)
        data = self.file.read(size)
        if len(data) < size:
            raise ValueError("it ends within its header")
        return int(struct.unpack("<" + code, data)[0])

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise ValueError("its header points beyond the end: truncated or corrupt")
        self.file.seek(count, os.SEEK_CUR)


def _bytes_of(kind: int) -> int:
    if kind not in _SCALAR_BYTES:
        raise ValueError(f"metadata of type {kind}")
    return _SCALAR_BYTES[kind]
