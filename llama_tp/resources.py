"""Files shipped with the package that are not modules: TorchServe's handler and configurations.

In the repository (a clone, an editable install, an sdist) they are next to the package, in a wheel inside it: see
force-include in pyproject.toml.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

HANDLER = "handler/llama_handler.py"
PROPERTIES = "configs/config.properties"
LOG_CONFIG = "configs/log4j2.xml"
METRICS_CONFIG = "configs/metrics.yaml"


def resource(name: str) -> Path:
    """The location of a file, by its path in the repository."""
    return _root() / name


def configurations() -> list[str]:
    """Paths of the files in configs/, relative to it."""
    folder = resource("configs")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _root() -> Path:
    package = Path(str(files("llama_tp")))
    return package if (package / HANDLER).is_file() else package.parent
