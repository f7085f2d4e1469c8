"""The folder for files that this program can recreate."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLAMA_TP_CACHE, else ~/.cache/llama_tp. ValueError if the user has no home folder."""
    try:
        return Path(os.environ.get("LLAMA_TP_CACHE") or Path.home() / ".cache" / "llama_tp")
    except RuntimeError:
        raise ValueError("the user has no home folder for downloads; set LLAMA_TP_CACHE to a folder") from None
