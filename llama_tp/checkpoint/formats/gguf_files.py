"""The files of a GGUF model: one, or the parts that llama.cpp's gguf-split makes of it.

Part 1 has all metadata; every part says in split.no and split.count, beside its name, which one it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.gguf_header import check_header
from llama_tp.checkpoint.formats.gguf_metadata import Metadata

_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.DOTALL)


def open_files(path: Path) -> tuple[list[Path], Metadata, dict[str, Any]]:
    """(the files, the first one's metadata, the gguf package's entry of every tensor by its name).

    path: any part. No file is parsed before the headers of all were found sound. ValueError names the file.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF needs the gguf package: pip install 'llama-tp[demo]'") from None
    paths = _parts(path)
    for part in paths:
        check_header(part)
    files = []
    for part in paths:
        try:
            files.append(gguf.GGUFReader(part))
        except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{part} is not a sound GGUF file: {str(error).splitlines()[0]}") from None
    metadata = [Metadata(part, file.fields) for part, file in zip(paths, files, strict=True)]
    for index, part_metadata in enumerate(metadata):
        _check_part(part_metadata, index, len(paths))
    entries = [entry for file in files for entry in file.tensors]
    found = {entry.name: entry for entry in entries}
    expected = metadata[0].integer("split.tensors.count", len(found))
    if not len(entries) == len(found) == expected:
        raise ValueError(
            f"{paths[0]}: the {len(paths)} part(s) hold {len(entries)} tensors ({len(found)} names), expected "
            f"{expected}; download them again"
        )
    return paths, metadata[0], found


def _parts(path: Path) -> list[Path]:
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name[2])
    paths = [path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"{path} is one of {count} parts, of which {listed} ({len(missing)} in all) cannot be found beside it; "
            "download the missing ones into the same folder"
        )
    return paths


def _check_part(metadata: Metadata, index: int, count: int) -> None:
    """ValueError if a file does not say that it is the part that its name makes it."""
    found = (metadata.integer("split.no", 0), metadata.integer("split.count", 1) or 1)
    if found != (index, count):
        raise ValueError(
            f"{metadata.path} says split.no={found[0]} and split.count={found[1]}, expected {index} and {count} from "
            "its name; a part keeps the name that it was published under (NAME-00001-of-00003.gguf)"
        )
