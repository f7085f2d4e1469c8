"""The folder for files that this program can recreate."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLAMA_TP_CACHE, else llama_tp in $XDG_CACHE_HOME, else ~/.cache/llama_tp. ValueError if the user has no home
    folder."""
    if own := os.environ.get("LLAMA_TP_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others must be ignored: https://specifications.freedesktop.org/basedir-spec
        return Path(base, "llama_tp")
    try:
        return Path.home() / ".cache" / "llama_tp"
    except RuntimeError:
        raise ValueError("the user has no home folder; set LLAMA_TP_CACHE to a folder") from None
