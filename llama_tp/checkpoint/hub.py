"""Meta's original weights from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

_FILES = ("consolidated.*.pth", "params.json", "tokenizer.model", "checklist.chk", "LICENSE*", "USE_POLICY*")
ORIGINALS = [*_FILES, *(f"original/{name}" for name in _FILES)]
"""Llama 2 has its originals at the top of the repository, Llama 3 in a folder."""


def download(model_name: str, revision: str | None = None, output: str = "model", token: str | None = None) -> str:
    """Download the originals of a model, for example meta-llama/Llama-2-7b, and return the folder with the .pth files.

    Files go into `output` as the hub's cache lays them out. A transfer that breaks off is taken up where it broke, and
    whole files are not fetched again. Without `token`, that of HF_TOKEN or of the login is used. ValueError, one line,
    says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{model_name}"
    login = "log in with `huggingface-cli login` or set HF_TOKEN"
    try:
        folder = snapshot_download(
            str(model_name),
            revision=revision and str(revision),
            cache_dir=str(output),
            token=token,
            allow_patterns=ORIGINALS,
        )
    except GatedRepoError:
        raise ValueError(f"{model_name} is gated: accept its licence at {page}, then {login}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{model_name} was not found: check the spelling; if it is private or gated, {login}"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{model_name} has no revision {revision!r}, see {page}/commits/main") from None
    except HFValidationError as error:
        raise ValueError(
            f"model_name={model_name!r} is not a repository name like meta-llama/Llama-2-7b: {error}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"cannot reach the hub for {model_name}: check the network, then run this again ({_first(error)})"
        ) from None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {model_name}: {_first(error)}") from None
    except OSError:
        raise
    # What a broken connection raises is of the HTTP library, which has changed twice in huggingface_hub.
    except Exception as error:
        problem = f"{type(error).__name__}: {_first(error)}"
        raise ValueError(
            f"the download of {model_name} broke off ({problem}): run this again, whole files stay"
        ) from None
    return str(_folder_of_weights(Path(folder), model_name))


def _folder_of_weights(folder: Path, model_name: str) -> Path:
    for candidate in (folder, folder / "original"):
        if any(candidate.glob("consolidated.*.pth")):
            return candidate
    raise ValueError(
        f"{model_name} has no original weights (consolidated.*.pth): take the repository that has, "
        "for Llama 2 the one without -hf, for example meta-llama/Llama-2-7b"
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
