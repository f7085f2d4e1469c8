"""A client for TorchServe on this host: never through a proxy, and with its tokens and API key if required."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from llama_tp.serving.access import read_key
from llama_tp.torchserve.properties import Address

Kind = Literal["inference", "management"]


class Client:
    """HTTP to one server. Plain http.client, because urllib would use the environment's proxies even for loopback."""

    def __init__(
        self,
        inference: Address,
        management: Address,
        model_name: str,
        *,
        key_file: Path,
        api_key_file: Callable[[], Path | None] = lambda: None,
    ) -> None:
        """key_file: TorchServe's tokens. api_key_file: finds the handler's key. The files need not exist."""
        self._addresses: dict[Kind, Address] = {"inference": inference, "management": management}
        self._model_name = model_name
        self._key_file = key_file
        self._api_key_file = api_key_file

    def why_not_ready(self) -> str | None:
        """Why the ranks are not ready; None if they are."""
        try:
            status, body = self._ask("management", "GET", f"/models/{self._model_name}", timeout_s=5)
        except (OSError, http.client.HTTPException) as error:
            return f"{self._addresses['management']} does not answer: {_line(error)}"
        if status != 200:
            return f"{self._addresses['management']} answers {status}: {_message(body)}"
        try:
            states = [worker["status"] for worker in json.loads(body)[0]["workers"]]
        except (ValueError, LookupError, TypeError):
            return f"{self._addresses['management']} is not TorchServe: unexpected response"
        if not states or any(state != "READY" for state in states):
            return f"the ranks of {self._model_name} are not ready: {', '.join(states) or 'there are none'}"
        return None

    def why_not_generating(self, timeout_s: float = 30) -> str | None:
        """Why the server cannot generate one token; None if it can. This is the only meaningful health check (/ping
        always says Healthy). A server with ready ranks that is too busy for one more request is healthy."""
        request = json.dumps({"prompt": [0], "max_new_tokens": 1, "temperature": 0}).encode()
        try:
            status, body = self._ask(
                "inference", "POST", f"/predictions/{self._model_name}", request, timeout_s=timeout_s
            )
        except TimeoutError:
            return f"{self._addresses['inference']} has not generated a token within {timeout_s:g} s"
        except (OSError, http.client.HTTPException) as error:
            return f"{self._addresses['inference']} does not answer: {_line(error)}"
        if status == 200 and b'"usage"' in body:
            return None
        if status in (429, 503) and self.why_not_ready() is None:
            return None
        return f"{self._addresses['inference']} answers {status}: {_message(body)}"

    def _ask(
        self, kind: Kind, method: str, path: str, body: bytes | None = None, *, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body."""
        key = self._key(kind)
        status, answer = self._send(kind, method, path, body, key, timeout_s)
        if status == 400 and key and key != (newer := self._key(kind)):  # just renewed by another process
            return self._send(kind, method, path, body, newer, timeout_s)
        return status, answer

    def _send(
        self, kind: Kind, method: str, path: str, body: bytes | None, key: str | None, timeout_s: float
    ) -> tuple[int, bytes]:
        address = self._addresses[kind]
        connection = _connection(address, timeout_s)
        headers = {"Content-Type": "application/json"} if body else {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if kind == "inference" and (api_key := self._api_key()):
            headers["X-Api-Key"] = api_key
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _key(self, kind: Kind) -> str | None:
        """The token, if the server requires one. TorchServe does not renew expired tokens, so this does: key_file.json
        then has the new one. Valid tokens are never renewed."""
        keys = self._read_keys()
        if kind in keys and _is_past(str(keys[kind].get("expiration time", ""))):
            self._send("management", "GET", f"/token?type={kind}", None, keys["API"]["key"], timeout_s=5)
            keys = self._read_keys()
        return str(keys[kind]["key"]) if kind in keys else None

    def _api_key(self) -> str | None:
        if (path := self._api_key_file()) is None:
            return None
        try:
            return read_key(path)
        except ValueError:
            return None

    def _read_keys(self) -> dict[str, Any]:
        try:
            keys = json.loads(self._key_file.read_text())
        except (OSError, ValueError):
            return {}
        return keys if isinstance(keys, dict) and "API" in keys else {}


def _connection(address: Address, timeout_s: float) -> http.client.HTTPConnection:
    if address.scheme == "https":  # to this machine, whose certificate is for other names
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(address.local_host, address.port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(address.local_host, address.port, timeout=timeout_s)


def _is_past(instant: str) -> bool:
    """Whether a Java Instant.toString() is past: UTC, with or without fractions, years beyond 9999 with a sign."""
    return instant[:1].isdigit() and instant[:19] <= datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _message(body: bytes) -> str:
    """The message of a TorchServe error or one of ours."""
    try:
        answer = json.loads(body)
        text = answer["error"]["message"] if "error" in answer else answer["message"]
    except (ValueError, LookupError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300] or "nothing"


def _line(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
