"""Who may use the model: whoever sends the API key, if there is one."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from llama_tp.serving.errors import ApiError

PUBLIC_ROUTES = frozenset({"chat"})
"""Routes that need no key: the chat page has a field for it."""
_MAX_KEY = 1024
_BEARER = "bearer "


class Access:
    """Compares keys in constant time. Keeps a hash of the key only."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    def check(self, credentials: str | None, route: str) -> None:
        """ApiError with status 401 unless these credentials, or no credentials, may use a route."""
        if route in PUBLIC_ROUTES:
            return
        remedy = "send the server's API key in the header Authorization: Bearer KEY, or x-api-key: KEY"
        if credentials is None:
            raise ApiError(401, "invalid_api_key", f"the request has no API key; {remedy}")
        if not hmac.compare_digest(self._digest, _digest(credentials)):
            raise ApiError(401, "invalid_api_key", f"the API key is wrong; {remedy}")


def credentials_in(headers: Mapping[str, object]) -> str | None:
    """The key in a request's headers, of which Anthropic's clients send `x-api-key` and OpenAI's `Authorization`. With
    both, the former: the latter may be for TorchServe or a proxy."""
    sent = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    if (key := sent.get("x-api-key")) is not None:
        return key.strip()
    authorization = sent.get("authorization", "")
    if not authorization.lower().startswith(_BEARER):
        return None
    return authorization[len(_BEARER) :].strip()


def read_key(path: str | Path) -> str:
    """The key in a file: its only line. ValueError, without the key, if it is none that a header can carry."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KEY + 2)
    except OSError as error:
        raise ValueError(f"api_key_file={str(path)!r} cannot be read: {error.strerror}") from None
    return valid_key(data.decode("latin-1").strip(), f"api_key_file={str(path)!r}: the key")


def valid_key(key: str, said: str) -> str:
    """The key. ValueError, which quotes `said` and not the key, if no header can carry it."""
    if not key:
        raise ValueError(f"{said} is empty; it must have at least one character")
    if len(key) > _MAX_KEY or not all("!" <= char <= "~" for char in key):
        raise ValueError(f"{said} must be at most {_MAX_KEY} visible ASCII characters without spaces")
    return key


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
