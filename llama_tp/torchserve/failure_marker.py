"""Remember that a model cannot be loaded, so that TorchServe's next attempt fails at once instead of reading it again.

TorchServe restarts a worker that failed to load for maxRetryTimeoutInSec. The marker is a small file per model folder
and user, in a private folder under TMPDIR, because the model's folder may be read-only. It is believed only while
everything that the verdict depends on is the same, and not for long.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from llama_tp.text.siblings import SIBLINGS

MAX_AGE_S = 900.0
"""A marker outlives TorchServe's retries (300 s by default), but not by much: what failed for a reason that nobody
thought of, such as a wrong answer from a network disk, is tried again."""
_SETTLED_S = 2.0
"""A file that changed this recently could change again within the resolution of its times."""
_MAX_FILES = 5_000
"""More are no checkpoint but a mistake, such as the root folder; then there is no marker."""
_MAX_BYTES = 64 * 1024
_FORMAT_VERSION = 1
_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "safetensors", "sentencepiece", "tokenizers", "tiktoken", "jinja2", "pydantic")
_VARIABLES = re.compile(r"(LLAMA_TP|CUDA|NVIDIA|NCCL|GLOO|OMP|MKL|PYTORCH)_\w+|(GROUP_|LOCAL_)?WORLD_SIZE")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class FailureMarker:
    """The verdict on one model folder under one configuration, in the state in which this object was made."""

    def __init__(self, yaml_config: object, model_dir: Path) -> None:
        model_dir = model_dir.resolve()
        self.path = _folder() / f"{hashlib.sha256(os.fsencode(model_dir)).hexdigest()[:32]}.json"
        files = dict(sorted(_files(yaml_config, model_dir)))
        is_complete = len(files) <= _MAX_FILES
        newest = max((max(state[2:]) for state in files.values() if state), default=0)
        self._is_settled = is_complete and time.time_ns() - newest > _SETTLED_S * 1e9
        self._key = hashlib.sha256(json.dumps(_circumstances(yaml_config, files)).encode()).hexdigest()

    def recall(self) -> str | None:
        """Why this model could not be loaded, if nothing has changed since and that is not long ago."""
        # A marker that cannot be read counts as none, for whatever reason.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if self._is_settled and _is_private(self.path.parent) and self.path.stat().st_size <= _MAX_BYTES:
                content = json.loads(self.path.read_bytes())
                age = time.time() - content["time"]
                if content["key"] == self._key and 0 <= age <= MAX_AGE_S and isinstance(content["reason"], str):
                    return str(content["reason"])
        return None

    def remember(self, reason: str) -> None:
        """Write the marker, if there is a place for it. All ranks of a host write the same."""
        if not self._is_settled:
            return
        content = {"format_version": _FORMAT_VERSION, "key": self._key, "reason": reason, "time": time.time()}
        with suppress(OSError):
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            if _is_private(self.path.parent):
                part = self.path.with_suffix(f".{secrets.token_hex(8)}")
                part.write_text(json.dumps(content))
                os.replace(part, self.path)

    def forget(self) -> None:
        """Remove the marker: the model has been loaded."""
        with suppress(OSError):
            self.path.unlink()


def _folder() -> Path:
    return Path(tempfile.gettempdir(), f"llama_tp.{os.getuid()}.failures")


def _is_private(folder: Path) -> bool:
    """Whether only this user can write to the folder, so that nobody else can keep a model from loading."""
    info = folder.lstat()
    return info.st_uid == os.getuid() and not info.st_mode & 0o077 and not folder.is_symlink()


def _circumstances(yaml_config: object, files: Mapping[str, object]) -> list[object]:
    """Everything that the verdict depends on, as JSON."""
    variables = {name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)}
    code = {str(path): _state(path) for path in sorted(_PACKAGE.rglob("*.py"))}
    versions = {name: _version(name) for name in ("llama-tp", *_LIBRARIES)}
    return [
        _FORMAT_VERSION,
        repr(yaml_config),
        files,
        sorted(variables.items()),
        _memory(),
        versions,
        sys.version,
        code,
    ]


def _files(yaml_config: object, model_dir: Path) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """The state of each file that loading reads: the checkpoint's, model_args.json, the tokenizer's."""
    handler = yaml_config.get("handler") if isinstance(yaml_config, Mapping) else None
    paths = dict(handler) if isinstance(handler, Mapping) else {}
    for path in _named(paths, model_dir):
        yield str(path), _state(path)


def _named(paths: Mapping[str, Any], model_dir: Path) -> Iterator[Path]:
    if isinstance(folder := paths.get("converted_ckpt_dir"), str):
        yield model_dir / folder
        yield from islice((model_dir / folder).rglob("*"), _MAX_FILES)
    if isinstance(args := paths.get("model_args_path"), str):
        yield model_dir / args
    if isinstance(tokenizer := paths.get("tokenizer_path"), str):
        path = model_dir / tokenizer
        yield path
        yield from (other / name for other in (path, path.parent) for name in (*_TOKENIZERS, *SIBLINGS))


def _state(path: Path) -> tuple[int, ...] | None:
    """Size, inode, and the times of the last change of content and of attributes; None if there is no such file."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    """The host's total memory, as the kernel writes it."""
    with suppress(OSError, IndexError):
        return Path("/proc/meminfo").read_text().splitlines()[0]
    return ""
