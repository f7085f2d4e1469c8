"""Download one form of a model from the Hugging Face hub: the publisher's own, safetensors, or a GGUF file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.huggingface_config import read_config
from llama_tp.checkpoint.formats.params import read_params
from llama_tp.checkpoint.hub.errors import first_line, is_unreachable, user_error
from llama_tp.checkpoint.hub.record import (
    DamagedFile,
    HubFile,
    Listing,
    Record,
    load_record,
    save_record,
    verify_files,
    why_incomplete,
)
from llama_tp.checkpoint.hub.selection import (
    CONFIG,
    HF,
    META,
    MISTRAL,
    PARAMS,
    Selection,
    gguf_files,
    gguf_form,
    has_tokenizer,
    select_consolidated,
    select_gguf,
    select_originals,
    select_safetensors,
)

FORMATS = ("auto", META, HF, MISTRAL)
_HUB_ID = re.compile(r"(?P<model_name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_FILE_ENDINGS = (".gguf", ".pth", ".safetensors", ".bin", ".json", ".model")


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """(repository, revision) of `owner/name` or `owner/name@revision`. None if the text is neither."""
    match = _HUB_ID.fullmatch(text)
    if match is None or match["model_name"].endswith(_FILE_ENDINGS):
        return None
    return match["model_name"], match["revision"]


def download(
    model_name: str,
    revision: str | None = None,
    output: str = "model",
    token: str | None = None,
    *,
    format: str = "auto",
    file: str | None = None,
) -> str:
    """Download one form of a model, such as meta-llama/Llama-2-7b, and return the folder or file to convert.

    `format`: "meta", the originals; "hf", config.json, safetensors and the tokenizer's files, if the architecture is
    supported; "mistral", Mistral AI's consolidated.safetensors and params.json; "auto", the first of these that the
    repository has. `file`: instead, one GGUF file, with all
    its parts if it is split; the first of them is returned.

    `output` has the layout of the hub's cache. An interrupted transfer resumes, at the latest on the next call; whole
    files are not fetched again. `token` defaults to HF_TOKEN or the login. What is returned is complete: every file
    exists with the size and, if it is in Git LFS, the sha256 that the hub lists. If the hub is unreachable, an earlier
    complete download is used. ValueError, in one line, gives the remedy.
    """
    _check_choice(format, file)
    repository = _Repository(str(model_name), revision and str(revision), str(output), token)
    try:
        commit, listing = _list_files(repository)
    except Exception as error:
        forms = [gguf_form(file)] if file else [META, HF, MISTRAL] if format == "auto" else [format]
        if earlier := _complete_before(repository, forms, error):
            return earlier
        raise repository.user_error(error) from None
    selection = _select(repository, listing, format, file)
    try:
        folder = repository.snapshot(selection.names)
    except Exception as error:
        raise repository.user_error(error) from None
    if commit not in (None, folder.name):  # or the client could not ask again, and returned an older one
        raise ValueError(f"{model_name} has changed during the download: run this again (finished files are kept)")
    _finish(repository, folder, selection, {name: listing[name] for name in selection.names})
    return str(folder / selection.target)


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository of the hub, and the folder into which it is downloaded."""

    model_name: str
    revision: str | None
    output: str
    token: str | None = field(repr=False)

    def snapshot(self, names: Iterable[str], **settings: Any) -> Path:
        """Fetch the files that are not there yet. The folder of the snapshot."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.model_name,
            revision=self.revision,
            cache_dir=self.output,
            token=self.token,
            allow_patterns=[escape(name) for name in names],
            **settings,
        )
        return Path(folder)

    def user_error(self, error: Exception) -> Exception:
        return user_error(error, self.model_name, self.revision)


def _check_choice(format: str, file: str | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if file is not None and format != "auto":
        raise ValueError(f"format={format} does not go with file={file}, which names the one thing to fetch")
    if file is not None and not file.endswith(".gguf"):
        raise ValueError(f"file={file!r} must be the name of a .gguf file; other formats are fetched without it")


def _list_files(repository: _Repository) -> tuple[str | None, Listing]:
    """(commit of the revision, all its files as the hub lists them)."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(
        repository.model_name, revision=repository.revision, token=repository.token, files_metadata=True
    )
    return info.sha, {
        file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()
    }


def _select(repository: _Repository, listing: Listing, format: str, file: str | None) -> Selection:
    """What is wanted of these files. ValueError if it is not among them, or is not supported."""
    name = repository.model_name
    if file is not None:
        if (selection := select_gguf(listing, file)) is None:
            raise ValueError(f"{name} has no file {file}, or not all its parts; {_list_gguf(listing)}")
        return selection
    if format in ("auto", META) and (selection := select_originals(listing)):
        return selection
    if format in ("auto", HF) and (selection := select_safetensors(listing)):
        _check_architecture(repository, CONFIG, read_config)
        return selection
    if format in ("auto", MISTRAL) and (selection := select_consolidated(listing)):
        if not has_tokenizer(selection):
            raise ValueError(
                f"{name} has no tokenizer.model or tokenizer.json beside consolidated.safetensors (tekken.json is not "
                "read): use a repository of the model in Hugging Face's format"
            )
        _check_architecture(repository, PARAMS, read_params)
        return selection
    if format == HF:
        raise ValueError(f"{name} has no Hugging Face model: {CONFIG} and model.safetensors, or shards and their index")
    if format == MISTRAL:
        raise ValueError(f"{name} has no consolidated.safetensors with {PARAMS}")
    hint = f"; {_list_gguf(listing)}: fetch one with --file" if gguf_files(listing) else ""
    raise ValueError(
        f"{name} has no original weights (consolidated.*.pth): use a repository that has them, "
        f"for Llama 2 the one without -hf, such as meta-llama/Llama-2-7b{hint}"
    )


def _list_gguf(listing: Listing) -> str:
    files = gguf_files(listing)
    return f"its GGUF files: {', '.join(files)}" if files else "it has no GGUF files"


def _check_architecture(repository: _Repository, name: str, read: Callable[[Path], object]) -> None:
    """Fetch the file that describes the model alone, and refuse what would be refused after gigabytes."""
    try:
        path = repository.snapshot([name]) / name
    except Exception as error:
        raise repository.user_error(error) from None
    try:
        read(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{repository.model_name} cannot be converted, nothing more was fetched: {reason}") from None


def _finish(repository: _Repository, folder: Path, selection: Selection, listing: Listing) -> None:
    """Verify and remember what was downloaded."""
    again = "run this again (finished files are kept)"
    if problem := why_incomplete(folder, listing):
        raise ValueError(f"the download of {repository.model_name} is not complete: {problem}; {again}")
    known = load_record(folder, selection.form)
    try:
        verified = verify_files(folder, listing, known.verified if known else {})
    except DamagedFile as error:
        # Otherwise the hub's client would take it for finished.
        error.path.resolve().unlink()
        raise ValueError(f"the download was damaged: {error}; it was removed, {again}") from None
    with suppress(OSError):  # without the record, the next call needs the network
        save_record(folder, selection.form, Record(listing, selection.target, verified))


def _complete_before(repository: _Repository, forms: Iterable[str], problem: Exception) -> str | None:
    """What to convert of an earlier download, if that is complete and the hub does not answer; else None."""
    if not is_unreachable(problem):
        return None
    try:
        # No names: with names, the folder is refused or returned as it is, depending on the client's version.
        folder = repository.snapshot([], local_files_only=True)
    except Exception:  # nothing was downloaded, or another revision
        return None
    for form in forms:
        if (record := load_record(folder, form)) is None or why_incomplete(folder, record.listing):
            continue
        with suppress(DamagedFile):
            verify_files(folder, record.listing, record.verified)
            print(f"the hub does not answer ({first_line(problem)}): using the earlier download", file=sys.stderr)
            return str(folder / record.target)
    return None
