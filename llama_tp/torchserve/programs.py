"""Find programs that pip installs, such as torchserve: next to Python in a virtual environment, elsewhere without."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def program(name: str) -> Path:
    """A program installed by a package of this Python; if not installed, its expected path."""
    beside_python = Path(sys.executable).parent
    user = sysconfig.get_preferred_scheme("user")
    for folder in (beside_python, sysconfig.get_path("scripts"), sysconfig.get_path("scripts", user)):
        if (path := Path(folder, name)).is_file():
            return path
    return beside_python / name
