"""The files that come with the package and are not modules of it: TorchServe's handler and configurations.

In the repository (a clone, an editable install, an sdist) they lie beside the package, in a wheel inside of it: see
force-include in pyproject.toml.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

HANDLER = "handler/llama_handler.py"
PROPERTIES = "configs/config.properties"
LOG_CONFIG = "configs/log4j2.xml"


def resource(name: str) -> Path:
    """Where a file is, by its path in the repository."""
    return _root() / name


def configurations() -> list[str]:
    """The files of configs/, by their paths in it."""
    folder = resource("configs")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _root() -> Path:
    package = Path(str(files("llama_tp")))
    return package if (package / HANDLER).is_file() else package.parent
