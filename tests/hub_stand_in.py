"""A stand-in of the Hugging Face hub on this machine, for tests of what is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.paths import ROOT

COMMIT = "365ffa8f1a6c455d3e2028ae658236b4b85ba824"
Refusal = tuple[int, dict[str, str]]
"""(status, headers) as the hub itself answers."""


@contextmanager
def serving(
    repositories: Mapping[str, Mapping[str, bytes]], refusals: Mapping[str, Refusal] | None = None
) -> Iterator[Hub]:
    """A hub that answers while the context is open."""
    hub = Hub(repositories, refusals or {})
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def variables(port: int, home: Path) -> dict[str, str]:
    """The environment of a process whose hub answers at a port. The address is read when huggingface_hub is imported.

    `home`: where its client keeps what it wants to keep.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    return inherited | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


class Hub(ThreadingHTTPServer):
    """Serves repositories as the hub does, all at one commit; everything else is not found."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], refusals: Mapping[str, Refusal]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.refusals = refusals
        """By a part of the path."""
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        """Cut off each transfer of weights after this many bytes."""
        self.withheld: set[str] = set()
        """Files that are listed and not given."""
        self.damaged: set[str] = set()
        """Files of which one byte is changed on the way."""

    def fetched(self) -> list[str]:
        """The paths in their repositories of the files that were asked for, once for each time."""
        gets = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in gets]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if refusal := next((refusal for name, refusal in self.server.refusals.items() if name in path), None):
            self._send(refusal[0], b"{}", refusal[1], body)
        elif path.rsplit("/", 1)[-1] in self.server.withheld:
            self._send(403, b"", {}, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(*match.groups(), body=body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(*match.groups(), body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _api(self, repo: str, kind: str | None, revision: str | None, *, body: bool) -> None:
        if repo not in self.server.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif revision not in (None, "main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif kind == "tree":
            entries = [_entry(name, data) for name, data in self.server.repositories[repo].items()]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        else:
            files = [_sibling(name, data) for name, data in self.server.repositories[repo].items()]
            info = {"id": repo, "sha": COMMIT, "siblings": files}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, repo: str, name: str, *, body: bool) -> None:
        files = self.server.repositories.get(repo, {})
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"}, body)
            return
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, piece = 200, data[:-1] + bytes([data[-1] ^ 1]) if name in self.server.damaged else data
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            status, piece = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(piece) - 1}/{len(data)}"
        self._send(status, piece, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            cut = self.server.cut_after if len(data) > 1000 else None
            self.wfile.write(data[:cut])
            self.close_connection = cut is not None


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    entry = _entry(name, data)
    lfs = {"lfs": {"sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 130}} if "lfs" in entry else {}
    return {"rfilename": name, "size": len(data), "blobId": entry["oid"], **lfs}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return entry | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if len(data) > 1000 else {})
