"""A virtual environment for one wheel: pip installs the wheel, and what its metadata asks for is linked from the
environment that runs the tests, so that torch is not downloaded again. Nothing else is there, least of all the clone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

_COPIED = {"ts"}  # torchserve takes its real path for the place where everything is installed


def install_alone(wheel: Path, extras: Iterable[str], folder: Path) -> Path:
    """Make the environment in `folder`, and return its bin/. pip fails if the wheel does not declare what it needs."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    site.mkdir(parents=True, exist_ok=True)
    for one in required(wheel, extras):
        _link(one, site, programs)
    subprocess.run(
        [programs / "python", "-m", "pip", "install", "--no-index", f"{wheel}[{','.join(extras)}]"],
        env={**bare_variables(), "PIP_CONFIG_FILE": os.devnull},
        cwd=folder,
        check=True,
    )
    return programs


def bare_variables() -> dict[str, str]:
    """The environment variables of somebody who has neither the clone nor its environment at hand."""
    ours = ("PYTHON", "PIP_", "VIRTUAL_ENV", "TS_", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PATH": os.defpath}


def required(wheel: Path, extras: Iterable[str]) -> list[Distribution]:
    """All that the wheel needs with these extras, directly or not, as installed here."""
    (ours,) = distributions(path=[str(wheel)])
    found: dict[str, Distribution] = {}
    queue, seen = [(ours, frozenset(extras))], set()
    while queue:
        one, wanted = queue.pop()
        for requirement in map(Requirement, one.requires or []):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
                continue
            name, more = requirement.name.lower(), frozenset(requirement.extras)
            if (name, more) not in seen:
                seen.add((name, more))
                found[name] = distribution(name)
                queue.append((found[name], more))
    return list(found.values())


def _link(one: Distribution, site: Path, programs: Path) -> None:
    for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
        source, target = Path(str(one.locate_file(top))), site / top
        if top in _COPIED:
            shutil.copytree(source, target)
        elif not target.exists():
            target.symlink_to(source)
    for file in one.files or []:
        if file.parts[0] == ".." and file.parts[-2] == "bin":
            _copy_program(Path(str(one.locate_file(file))), programs)


def _copy_program(source: Path, programs: Path) -> None:
    """With the Python of this environment in its first line, as pip would have written it."""
    first, _, rest = source.read_bytes().partition(b"\n")
    if first.startswith(b"#!"):
        first = b"#!" + os.fsencode(programs / "python")
    target = programs / source.name
    target.write_bytes(first + b"\n" + rest)
    target.chmod(0o755)
