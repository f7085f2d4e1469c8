"""What an error of the hub or of the network means for the user, and what to do about it, in one line."""

from __future__ import annotations

from typing import Any

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_RETRIABLE = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that say nothing about the repository or the user."""


def is_unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, or not as it should; what it would have said is unknown."""
    return _status(error) in (*_RETRIABLE, None) and not isinstance(error, ValueError)


def user_error(error: Exception, model_name: str, revision: str | None) -> Exception:
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
        return f"model_name={model_name!r} is not a repository name like meta-llama/Llama-2-7b: {first_line(error)}"
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
            f"gated repositories at https://huggingface.co/settings/tokens, or {_LOGIN} again ({first_line(error)})"
        )
    if status == 429:
        return f"rate-limited by the hub (429): wait a few minutes and run this again, or {_LOGIN}"
    if status is not None and status >= 500:
        return f"the hub failed ({status}): run this again later (finished files are kept)"
    if status is not None:
        return f"the hub refused {model_name} ({status}): {first_line(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{model_name} is not fully downloaded, and HF_HUB_OFFLINE is set: unset it"
    problem = f"{type(error).__name__}: {first_line(error)}"
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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
