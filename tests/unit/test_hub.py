"""The download against a stand-in of the hub on this machine: what is fetched, what is said, and that it resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from llama_tp.checkpoint import hub as hub_module
from tests.paths import ROOT, SCRIPTS

COMMIT = "365ffa8f1a6c455d3e2028ae658236b4b85ba824"
WEIGHTS = b"weights of the original" * 50_000
LLAMA2 = {
    "consolidated.00.pth": WEIGHTS,
    "params.json": b"{}",
    "tokenizer.model": b"tokens",
    "checklist.chk": b"sums",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
    "README.md": b"readme",
    "model.safetensors": b"not these",
}
REPOSITORIES = {
    "meta-llama/Llama-2-7b": LLAMA2,
    "meta-llama/Llama-3.2-1B": {f"original/{name}": data for name, data in LLAMA2.items()} | {"model.safetensors": b""},
    "meta-llama/Llama-2-7b-hf": {"config.json": b"{}", "model.safetensors": b"", "tokenizer.model": b"tokens"},
}


REFUSALS = {
    # (status, headers) as the hub itself answers
    "gated/model": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to gated/model is restricted"}),
    "private/model": (401, {"X-Error-Message": "Invalid username or password."}),
    "stale-token/model": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "fine-grained/model": (403, {"X-Error-Message": "Please enable access to public gated repositories"}),
    "busy/model": (429, {"Retry-After": "60"}),
    "broken/model": (503, {}),
}


class Hub(ThreadingHTTPServer):
    """Serves REPOSITORIES as the hub does; REFUSALS are refused, everything else is not found."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        """Break off each transfer of weights after this many bytes."""
        self.withheld: set[str] = set()
        """Files that are listed and not given."""


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
        if refusal := next((refusal for name, refusal in REFUSALS.items() if name in path), None):
            self._send(refusal[0], b"{}", refusal[1], body)
        elif path.rsplit("/", 1)[-1] in self.server.withheld:
            self._send(403, b"", {}, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(*match.groups(), body=body)
        elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and match[1] in REPOSITORIES:
            self._file(REPOSITORIES[match[1]].get(match[3]), body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _api(self, repo: str, kind: str | None, revision: str | None, *, body: bool) -> None:
        if repo not in REPOSITORIES:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif revision not in (None, "main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif kind == "tree":
            entries = [_entry(name, data) for name, data in REPOSITORIES[repo].items()]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        else:
            files = [{"rfilename": name, "size": len(data)} for name, data in REPOSITORIES[repo].items()]
            info = {"id": repo, "sha": COMMIT, "siblings": files}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, data: bytes | None, body: bool) -> None:
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, piece = 200, data
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


def _entry(name: str, data: bytes) -> dict[str, object]:
    sha256 = hashlib.sha256(data).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return entry | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if len(data) > 1000 else {})


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(tmp_path, port, *args, **env):
    """Run the script as a user does: the hub's address is read when huggingface_hub is imported."""
    variables = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    variables |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    command = [sys.executable, str(SCRIPTS / "download_model.py"), *args]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b", "meta-llama/Llama-3.2-1B"])
def test_the_originals_and_only_they_are_fetched_and_their_folder_is_printed(hub, tmp_path, name):
    done = download(tmp_path, hub.server_port, "--model_name", name)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert (tmp_path / folder).is_relative_to(tmp_path / "model")
    wanted = set(LLAMA2) - {"README.md", "model.safetensors"}
    assert {path.name for path in (tmp_path / folder).iterdir()} == wanted
    assert (tmp_path / folder / "consolidated.00.pth").read_bytes() == WEIGHTS
    assert not any("safetensors" in path or "README" in path for _, path, _ in hub.requests)


def test_a_transfer_that_breaks_off_is_taken_up_where_it_broke(hub, tmp_path, monkeypatch):
    # The client counts what it has in chunks of 10 MB.
    weights = bytes(range(256)) * 90_000
    monkeypatch.setitem(LLAMA2, "consolidated.00.pth", weights)
    hub.cut_after = 12_000_000
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b", "--output", "elsewhere")
    assert done.returncode == 0, done.stderr
    ranges = [range_ for method, path, range_ in hub.requests if method == "GET" and path.endswith(".pth")]
    assert [int(re.findall(r"\d+", range_ or "0")[0]) for range_ in ranges] == [0, 10_485_760, 20_971_520]
    assert (tmp_path / done.stdout.strip().splitlines()[-1] / "consolidated.00.pth").read_bytes() == weights


def test_an_error_of_whatever_http_library_is_one_line(monkeypatch):
    class RemoteProtocolError(Exception):
        pass

    def broken(*_args, **_kwargs):
        raise RemoteProtocolError("peer closed connection\nwithout a word")

    monkeypatch.setattr(hub_module, "_list_originals", lambda *_: {"consolidated.00.pth": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(
        ValueError, match=r"connection was lost \(RemoteProtocolError: peer closed connection\): .*run this again"
    ):
        hub_module.download("meta-llama/Llama-2-7b")


def test_a_refusal_that_the_client_calls_a_missing_file_is_told_by_its_status(monkeypatch):
    """While files are fetched the client reports a 429 as "cannot find the file, check your internet connection"."""

    class TooManyRequests(Exception):
        response = SimpleNamespace(status_code=429, headers={})

    def limited(*_args, **_kwargs):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file") from TooManyRequests()

    monkeypatch.setattr(hub_module, "_list_originals", lambda *_: {"consolidated.00.pth": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", limited)
    with pytest.raises(ValueError, match=r"rate-limited by the hub \(429\)"):
        hub_module.download("meta-llama/Llama-2-7b")


def test_a_full_disk_is_not_called_a_broken_connection(monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module, "_list_originals", lambda *_: {"consolidated.00.pth": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        hub_module.download("meta-llama/Llama-2-7b")


FOUR_SHARDS = {f"consolidated.{rank:02d}.pth": 3 for rank in range(4)}


@pytest.fixture
def half_a_download(tmp_path):
    """Two of four shards in the hub's layout, as huggingface_hub 0.25 to 1.x returns them when it cannot ask."""
    folder = tmp_path / "models--meta-llama--Llama-2-70b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in list(FOUR_SHARDS)[:2]:
        (folder / name).write_bytes(b"abc")
    return folder


@pytest.mark.parametrize("is_reachable", [True, False])
def test_half_a_download_is_not_passed_off_as_a_whole_one(monkeypatch, half_a_download, is_reachable):
    """Exit code 0 and 2 of 4 shards: the client returns whatever folder is there."""

    def list_originals(*_args):
        if not is_reachable:
            raise ConnectionError("Network is unreachable")
        return FOUR_SHARDS

    monkeypatch.setattr(hub_module, "_list_originals", list_originals)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(half_a_download))
    words = r"2 of 4 files are missing \(consolidated\.02\.pth" if is_reachable else r"cannot reach the hub"
    with pytest.raises(ValueError, match=words):
        hub_module.download("meta-llama/Llama-2-70b")


def test_a_file_of_another_size_than_the_hub_s_is_named(monkeypatch, half_a_download):
    for name in FOUR_SHARDS:
        (half_a_download / name).write_bytes(b"abc" if name != "consolidated.03.pth" else b"a")
    monkeypatch.setattr(hub_module, "_list_originals", lambda *_: FOUR_SHARDS)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(half_a_download))
    with pytest.raises(ValueError, match=r"consolidated\.03\.pth has 1 bytes, but 3 on the hub"):
        hub_module.download("meta-llama/Llama-2-70b")


def test_a_download_that_broke_off_is_refused_without_network_and_completed_with_it(hub, tmp_path):
    hub.withheld = {"consolidated.00.pth"}
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "check the network" in done.stderr
    hub.withheld = set()
    done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_complete_download_needs_no_network(hub, tmp_path, variable):
    online = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b")
    offline = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b", **variable)
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout
    (tmp_path / online.stdout.strip() / "consolidated.00.pth").unlink()
    assert download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b", **variable).returncode == 1


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    for _ in range(2):
        done = download(tmp_path, hub.server_port, "--model_name", "meta-llama/Llama-2-7b", "--revision", "main")
        assert done.returncode == 0, done.stderr
    gets = Counter(path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path)
    assert gets
    assert set(gets.values()) == {1}


REFUSED = {
    "gated": (("gated/model",), ("accept its licence", "https://huggingface.co/gated/model", "HF_TOKEN", "login")),
    "private, or gated and not logged in": (("private/model",), ("private or gated", "`hf auth login`")),
    "a token that is no longer valid": (("stale-token/model",), ("does not accept the token (401)", "`hf auth login`")),
    "a token without the right": (("fine-grained/model",), ("may not read", "(403)", "settings/tokens")),
    "asked too often": (("busy/model",), ("(429)", "wait", "`hf auth login`")),
    "a hub with problems": (("broken/model",), ("(503)", "later")),
    "misspelt": (("meta-llama/Lama-2-7b",), ("meta-llama/Lama-2-7b was not found", "spelling")),
    "not a name": (("a/b/c",), ("not a repository name",)),
    "no such revision": (("meta-llama/Llama-2-7b", "--revision", "v9"), ("no revision 'v9'",)),
    "not the originals": (("meta-llama/Llama-2-7b-hf",), ("no original weights", "meta-llama/Llama-2-7b")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_that_says_what_to_do(hub, tmp_path, case):
    arguments, words = REFUSED[case]
    done = download(tmp_path, hub.server_port, "--model_name", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_without_network_the_line_says_so(tmp_path):
    done = download(tmp_path, 9, "--model_name", "meta-llama/Llama-2-7b")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "check the network" in done.stderr
