"""Download Meta's original weights from the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_FILES = ("consolidated.*.pth", "params.json", "tokenizer.model", "*checklist.chk", "LICENSE*", "USE_POLICY*")
ORIGINALS = [*_FILES, *(f"original/{name}" for name in _FILES)]
"""Llama 2 has its originals at the top level of the repository, Llama 3 in a folder."""

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_RETRIABLE = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that say nothing about the repository or the user."""


def download(model_name: str, revision: str | None = None, output: str = "model", token: str | None = None) -> str:
    """Download a model's originals, such as meta-llama/Llama-2-7b, and return the folder with the .pth files.

    `output` has the layout of the hub's cache. An interrupted transfer resumes, at the latest on the next call; whole
    files are not fetched again. `token` defaults to HF_TOKEN or the login. The returned folder is complete: every file
    that the hub lists exists with its size. If the hub is unreachable, an earlier complete download is used.
    ValueError, in one line, gives the remedy.
    """
    model_name, revision = str(model_name), revision and str(revision)
    try:
        listed = _list_originals(model_name, revision, token)
    except Exception as error:
        if folder := _complete_before(model_name, revision, str(output), error):
            return str(_folder_of_weights(folder, model_name))
        raise _user_error(error, model_name, revision) from None
    if not any(name.endswith(".pth") for name in listed):
        raise ValueError(_no_originals(model_name))
    try:
        folder = _snapshot(model_name, revision, str(output), token=token)
    except Exception as error:
        raise _user_error(error, model_name, revision) from None
    if problem := _why_incomplete(folder, listed):
        raise ValueError(
            f"the download of {model_name} is not complete: {problem}; run this again (finished files are kept)"
        )
    with suppress(OSError):  # without the record, the next call needs the network
        _record(folder).write_text(json.dumps(listed, indent=1) + "\n")
    return str(_folder_of_weights(folder, model_name))


def _list_originals(model_name: str, revision: str | None, token: str | None) -> dict[str, int | None]:
    """The hub's size for each file name."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    info = HfApi().model_info(model_name, revision=revision, token=token, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    return {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=ORIGINALS)}


def _snapshot(model_name: str, revision: str | None, output: str, **settings: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model_name, revision=revision, cache_dir=output, allow_patterns=ORIGINALS, **settings)
    )


def _why_incomplete(folder: Path, listed: Mapping[str, int | None]) -> str | None:
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"{len(missing)} of {len(listed)} files are missing ({', '.join(missing[:3])}{more})"
    for name, size in listed.items():
        if size is not None and (found := (folder / name).stat().st_size) != size:
            return f"{folder / name} has {found} bytes, but {size} on the hub"
    return None


def _complete_before(model_name: str, revision: str | None, output: str, problem: Exception) -> Path | None:
    """The folder of an earlier download, if that is complete and the hub does not answer; else None.

    snapshot_download alone would return an incomplete folder, depending on its version.
    """
    if _status(problem) not in (*_RETRIABLE, None) or isinstance(problem, ValueError):
        return None
    # Nothing was downloaded, or another revision, or its record is damaged.
    with suppress(OSError, ValueError, TypeError, AttributeError):
        folder = _snapshot(model_name, revision, output, local_files_only=True)
        if _why_incomplete(folder, json.loads(_record(folder).read_text())) is None:
            print(f"the hub does not answer ({_first(problem)}): using the earlier download", file=sys.stderr)
            return folder
    return None


def _record(folder: Path) -> Path:
    """The file list of a complete download, next to the hub's own blobs, refs and snapshots."""
    return folder.parents[1] / f".llama_tp.{folder.name}.json"


def _user_error(error: Exception, model_name: str, revision: str | None) -> Exception:
    """A one-line ValueError for errors of the hub or the network; disk errors unchanged."""
    is_disk_error = isinstance(error, OSError) and type(error).__module__ == "builtins"
    if is_disk_error and not isinstance(error, (ConnectionError, TimeoutError)):
        return error
    return ValueError(_explain(error, model_name, revision))


def _explain(error: Exception, model_name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model_name}"
    status = _status(error)
    if isinstance(error, errors.HFValidationError):
        return f"model_name={model_name!r} is not a repository name like meta-llama/Llama-2-7b: {_first(error)}"
    if isinstance(error, errors.GatedRepoError):
        return f"{model_name} is gated: accept its licence at {page}, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model_name} has no revision {revision!r}; see {page}/commits/main"
    response = _response(error)
    is_bad_token = response is not None and "Invalid credentials" in response.headers.get("X-Error-Message", "")
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not is_bad_token):
        return f"{model_name} was not found: check the spelling; if it is private or gated, {_LOGIN}"
    if status == 401:
        return f"the hub does not accept the token (401): {_LOGIN} again"
    if status == 403:
        return (
            f"the token may not read {model_name} (403): accept the licence at {page}, and allow the token to read "
            f"gated repositories at https://huggingface.co/settings/tokens, or {_LOGIN} again ({_first(error)})"
        )
    if status == 429:
        return f"rate-limited by the hub (429): wait a few minutes and run this again, or {_LOGIN}"
    if status is not None and status >= 500:
        return f"the hub failed ({status}): run this again later (finished files are kept)"
    if status is not None:
        return f"the hub refused {model_name} ({status}): {_first(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{model_name} is not fully downloaded, and HF_HUB_OFFLINE is set: unset it"
    problem = f"{type(error).__name__}: {_first(error)}"
    return (
        f"cannot reach the hub for {model_name}, or the connection was lost ({problem}): check the network, then run "
        "this again (finished files are kept)"
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error; None if the hub did not answer."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _response(error: BaseException | None) -> Any:
    """The hub's response, which huggingface_hub may have wrapped in several errors."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def _folder_of_weights(folder: Path, model_name: str) -> Path:
    for candidate in (folder, folder / "original"):
        if any(candidate.glob("consolidated.*.pth")):
            return candidate
    raise ValueError(_no_originals(model_name))


def _no_originals(model_name: str) -> str:
    return (
        f"{model_name} has no original weights (consolidated.*.pth): use a repository that has them, "
        "for Llama 2 the one without -hf, such as meta-llama/Llama-2-7b"
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
