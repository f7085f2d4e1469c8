"""Identify what a file or folder really is, whatever its name, for the error messages of readers.

Users rename files, download login pages and clone repositories without Git LFS. Each reader knows what it expects; this
module recognizes everything else, and says what to do about it.
"""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes needed to identify a file."""

MAX_JSON_BYTES = 64 << 20
"""Of JSON files that describe a model; the largest, the index of a model in hundreds of files, has one."""
_SHOWN = 120
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GGUF = b"GGUF"
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch before 1.6


def read_head(path: Path) -> bytes:
    """The beginning of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def read_small(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of reasonable size. ValueError for a larger one, a device or a pipe.

    FileNotFoundError, IsADirectoryError and so on as from `Path.read_bytes`.
    """
    mode, size = (status := path.stat()).st_mode, status.st_size
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is not a regular file; copy the file")
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, expected at most {max_bytes}; download it again")
    return path.read_bytes()


def shown(name: object) -> str:
    """A name from a file for one line of a message: without line breaks, control characters and great length."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    return path.is_file() and read_head(path).startswith(_GGUF)


def check_link(folder: Path, path: Path) -> None:
    """ValueError for a link out of the folder, except into the blobs of the hub cache that the folder is in."""
    inside = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in inside.parents if parent.name == "snapshots"]
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # Python 3.13 and later; before
        raise ValueError(f"{path} is a link to itself; copy the file") from None
    if not any(target.is_relative_to(root) for root in (inside, *blobs)):
        raise ValueError(f"{path} is a link that leaves the folder, to {target}; copy the file")


def why_no_content(head: bytes) -> str | None:
    """Describes a placeholder for a file: "is ..., do ...". None if `head` may begin a real file."""
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not text:
        return "is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
    if re.match(rb"<(!doctype|html|head|\?xml)", text, re.IGNORECASE):
        return "is an HTML or XML page; download it again (does it require a login, or an accepted licence?)"
    return None


def describe_weights(path: Path) -> str | None:
    """Describes a file of weights that is not a torch.save zip archive: "is ..., do ...". None if it is one."""
    head = read_head(path)
    if problem := why_no_content(head):
        return problem
    if head.startswith(b"PK\x03\x04"):
        return None
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "is a safetensors file under another name; use Meta's original weights"
    if head.startswith(_GGUF):
        return "is a GGUF file under another name; use Meta's original weights"
    if head.startswith(_LEGACY_TORCH):
        return f"is in the format of torch before 1.6, which cannot be memory-mapped; rewrite it: {_rewriting(path)}"
    if head.startswith(b"\x80"):
        return "is a bare pickle, which is not loaded; use Meta's original weights"
    return "was not written by torch.save; download it again"


def _rewriting(path: Path) -> str:
    """A shell command that gives a file the format of today's torch. It holds the tensors in memory."""
    code = "import os, sys, torch; p = sys.argv[1]; n = p + '.new'; "
    code += "torch.save(torch.load(p, map_location='cpu', weights_only=True), n); os.replace(n, p)"
    return f'python -c "{code}" {shlex.quote(str(path))}'


def describe_model_folder(folder: Path) -> str | None:
    """Describes a model folder: "holds ..., do ...". None if nothing is recognized."""
    if not folder.is_dir():
        return None
    names = {path.name for path in folder.iterdir()}
    if {"manifest.json", ".metadata"} <= names:
        return "is already a converted checkpoint"
    if any(re.fullmatch(r"consolidated\.\d\d\.pth", name) for name in names):
        return "holds Meta's original weights; convert them with `llama-tp convert`"
    if (folder / "original" / "params.json").is_file():
        return f"is a Hugging Face repository; Meta's original weights are in {folder / 'original'}"
    if "config.json" in names:
        return "holds a Hugging Face model; convert it with `llama-tp convert`"
    if any(name.endswith(".gguf") for name in names):
        return "holds a GGUF model; convert that file with `llama-tp convert`"
    if any(name.endswith(".safetensors") for name in names):
        return "holds safetensors without the config.json of their Hugging Face model; download that as well"
    return None
