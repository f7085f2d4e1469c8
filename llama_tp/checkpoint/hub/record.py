"""A finished download: every file that the hub lists is there and is what the hub says. Hashed once, and remembered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from llama_tp.checkpoint.progress import byte_progress
from llama_tp.checkpoint.store.hash_cache import FileState
from llama_tp.checkpoint.store.manifest import hash_file
from llama_tp.checkpoint.store.staging import replace_file

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the hub lists about a file."""

    size: int | None
    """Bytes."""
    sha256: str | None = None
    """Lowercase hex; only of files in Git LFS, as all weights are."""


Listing = Mapping[str, HubFile]
"""By path in the repository."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a finished download."""

    listing: Listing
    target: str
    """The folder or file in the repository that can be converted."""
    verified: Mapping[str, FileState]
    """The files that matched their sha256, in the state that they had then."""


class DamagedFile(ValueError):
    """A file is not what the hub lists."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.path = path


def why_incomplete(folder: Path, listing: Listing) -> str | None:
    """Names files that are missing from the folder; None if none is."""
    missing = [name for name in listing if not (folder / name).is_file()]
    if not missing:
        return None
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{len(missing)} of {len(listing)} files are missing ({', '.join(missing[:3])}{more})"


def verify_files(folder: Path, listing: Listing, verified: Mapping[str, FileState]) -> dict[str, FileState]:
    """Compare files with the listing; a file in the state in which it was verified is not hashed again.

    Returns the states of those that have a sha256. DamagedFile names the first that differs.
    """
    for name, file in listing.items():
        if file.size is not None and (found := (folder / name).stat().st_size) != file.size:
            raise DamagedFile(folder / name, f"has {found} bytes, but {file.size} on the hub")
    states = {name: FileState.of(folder / name) for name, file in listing.items() if file.sha256 is not None}
    changed = [name for name, state in states.items() if verified.get(name) != state]
    with byte_progress("Verifying", sum(states[name].size for name in changed)) as advance:
        for name in changed:
            if (sha256 := hash_file(folder / name, advance)) != listing[name].sha256:
                raise DamagedFile(folder / name, f"has sha256 {sha256}, but {listing[name].sha256} on the hub")
    return states


def load_record(folder: Path, form: str) -> Record | None:
    """What `save_record` wrote. None if there is nothing, or nothing readable: the files are then verified anew."""
    try:
        content = json.loads(_path(folder, form).read_bytes())
        if content["format_version"] != _FORMAT_VERSION:
            return None
        listing = {name: HubFile(entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        verified = {name: FileState(*map(int, state)) for name, state in content["verified"].items()}
        return Record(listing, str(content["target"]), verified)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def save_record(folder: Path, form: str, record: Record) -> None:
    """Remember that the download into the folder is complete."""
    content = {
        "format_version": _FORMAT_VERSION,
        "target": record.target,
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in record.listing.items()},
        "verified": {name: astuple(state) for name, state in record.verified.items()},
    }
    replace_file(_path(folder, form), json.dumps(content, indent=1) + "\n")


def _path(folder: Path, form: str) -> Path:
    """Next to the hub's own blobs, refs and snapshots."""
    return folder.parents[1] / f".llama_tp.{folder.name}.{form}.json"
