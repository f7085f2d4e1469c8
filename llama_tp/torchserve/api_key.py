"""The file from which the handler reads a server's API key."""

from __future__ import annotations

import os
from pathlib import Path

from llama_tp.serving.access import read_key, valid_key

_NAME = "api_key"


def store_api_key(run_dir: Path, *, key: str | None = None, file: str | None = None) -> Path | None:
    """Write the key, or that in a file of the user's, to a file in run_dir that only this user can read; without both,
    remove an earlier server's, and return None. ValueError for what is no key."""
    path = run_dir / _NAME
    if key is not None:
        valid_key(key, "the API key")
    elif file is not None:
        key = read_key(file)
    run_dir.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if key is None:
        return None
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as written:
        written.write(f"{key}\n")
    return path
