"""Where things are in the repository, and what is in a folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"


def names_in(folder: Path) -> list[str]:
    """The names of what lies in it, sorted."""
    return sorted(path.name for path in folder.iterdir())
