"""Bad input in every dialect, row by row, while four greedy streams run beside it and must not change."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.bad_input import APIS, CASES, GENERATING, HI, MARKER, MAX_SEQ_LEN, Api, Row
from tests.e2e.torchserve_rig import PREDICT, TorchServe, convert, package, serve
from tests.tiny_llama2 import DIALOG, ENDLESS, PASSAGE_REQUEST, passage_prompt

pytestmark = pytest.mark.e2e

NUM_SLOTS = 8
REFUSED_WITHIN_S = 2.0
GREEDY = {"temperature": 0, "stream": True}
OPENAI = {**GREEDY, "max_tokens": 300, "return_token_ids": True}
STREAMS: list[tuple[str, Mapping[str, Any]]] = [
    ("", {**PASSAGE_REQUEST, "stream": True}),
    ("", {"prompt": ENDLESS, "max_new_tokens": 300, **GREEDY}),
    ("/1.0/v1/completions", {"prompt": passage_prompt(12), **OPENAI}),
    ("/1.0/v1/chat/completions", {"messages": DIALOG, **OPENAI}),
]
"""The four neighbours: route and body."""


@pytest.fixture(scope="module")
def server(tiny_llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    work = tmp_path_factory.mktemp("model")
    convert(tiny_llama2, work)
    limits = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": NUM_SLOTS, "max_new_tokens": 24, "mode": "chat"}
    store = package(work, config={"batchSize": NUM_SLOTS}, handler=limits)
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


def tokens_of(server: TorchServe, route: str, body: Mapping[str, Any]) -> list[int]:
    """The ids of a stream's tokens."""
    response = server.post(body, path=PREDICT + route)
    assert response.status == 200, response.body
    lines = [line.removeprefix(b"data: ") for line in response.body.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != b"[DONE]"]
    if not route:
        return [token for chunk in chunks for token in chunk["ids"]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [token for choice in choices for token in choice.get("token_ids", ())]


class Neighbours:
    """Ask for all STREAMS, again and again, each in its own thread, until they are told to stop."""

    def __init__(self, server: TorchServe) -> None:
        self.alone = [tokens_of(server, *stream) for stream in STREAMS]
        self.seen: list[list[list[int]]] = [[] for _ in STREAMS]
        self.errors: list[Exception] = []
        self._server = server
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(len(STREAMS))]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int) -> None:
        try:
            while not self._stopping.is_set():
                self.seen[index].append(tokens_of(self._server, *STREAMS[index]))
        except Exception as error:
            self.errors.append(error)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def neighbours(server: TorchServe) -> Iterator[Neighbours]:
    running = Neighbours(server)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def ranks_before(server: TorchServe) -> dict[int, Any]:
    return server.ranks()


@pytest.mark.parametrize(("api", "row"), CASES, ids=lambda value: getattr(value, "name", None) or str(value))
def test_a_row_of_the_table(
    server: TorchServe, neighbours: Neighbours, ranks_before: dict[int, Any], api: Api, row: Row
) -> None:
    body = api.body(row)
    for content_type in (None, "application/json"):
        response = server.post(body, content_type, path=PREDICT + api.route)
        assert response.status == row.status, response.body
        if row.code is not None:
            assert_refused(api, row, body, response)


def assert_refused(api: Api, row: Row, body: Any, response: Any) -> None:
    assert response.headers["content-type"] == "application/json"

    def is_a_field(param: str) -> bool:
        if not isinstance(body, Mapping) or row.code == "missing_field":
            return True
        root = re.split(r"[.\[]", param)[0]
        return any(name.startswith(root[:32]) for name in map(escaped, body))

    code = row.codes.get(api.name, row.code)
    message = api.message(response.json(), code, row.status, is_a_field)
    assert 10 < len(message) <= 1000
    assert message.isprintable()


def escaped(text: str) -> str:
    return text.replace("\n", "\\n")


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_a_huge_prompt_is_refused_at_once(server: TorchServe, neighbours: Neighbours, api: Api) -> None:
    """A busy machine may take longer once."""
    text = "whale 🐋 é" * 80_000
    body = {api.prompt: text} if api.prompt else {api.dialog: [{**HI, "content": text}]}

    def seconds() -> float:
        begun = time.monotonic()
        response = server.post({**body, **api.required}, path=PREDICT + api.route)
        assert response.status == 400
        api.message(response.json(), "context_length_exceeded", 400)
        return time.monotonic() - begun

    assert any(seconds() < REFUSED_WITHIN_S for _ in range(3))


@pytest.mark.parametrize(
    "path", ["/1.0/v1/poems", "/1.0/v1", "/1.0/openapi.yaml", "/1.0/poems%5BPID%5D1", "/1.0/v1/models/x"]
)
def test_an_unknown_route_is_not_found(server: TorchServe, neighbours: Neighbours, path: str) -> None:
    for body in (b"", b"{}", b'{"prompt": "Hi"}'):
        response = server.post(body, path=PREDICT + path)
        assert (response.status, response.json()["error"]["code"]) == (404, "unknown_route")


@pytest.mark.parametrize("break_", ["%0A", "%00"])
def test_a_line_break_in_a_route_is_refused_by_torchserve(
    server: TorchServe, neighbours: Neighbours, break_: str
) -> None:
    """It hands routes over in a header, which may not hold one."""
    response = server.post(b'{"prompt": "Hi"}', path=f"{PREDICT}/1.0/poems{break_}b")
    assert response.status == 403


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_a_form_is_refused_and_a_request_without_a_body(server: TorchServe, neighbours: Neighbours, api: Api) -> None:
    path = PREDICT + api.route
    form = server.request("POST", path, b'{"prompt": "Hi"}', "application/x-www-form-urlencoded")
    assert form.status == 415
    api.message(form.json(), "form_not_supported", 415)
    empty = server.request("GET", path)
    assert empty.status == 400
    api.message(empty.json(), "invalid_json", 400)


@pytest.mark.parametrize("api", GENERATING, ids=lambda api: api.name)
def test_the_content_type_does_not_matter_otherwise(server: TorchServe, neighbours: Neighbours, api: Api) -> None:
    body = json.dumps(api.body(Row(None, {"max_new_tokens": 1}))).encode()
    for content_type in ("text/plain", "application/octet-stream", "application/json; charset=latin-1", "image/png"):
        assert server.post(body, content_type, path=PREDICT + api.route).status == 200


@pytest.mark.parametrize("api", GENERATING, ids=lambda api: api.name)
def test_a_chunked_upload_is_a_request_like_others(server: TorchServe, neighbours: Neighbours, api: Api) -> None:
    for row, status in ((Row(None, {"max_new_tokens": 1}), 200), (Row("invalid_value", {"temperature": 9}), 400)):
        body = json.dumps(api.body(row)).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=60)
        try:
            pieces = iter([body[:5], body[5:]])
            connection.request(
                "POST", PREDICT + api.route, pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True
            )
            assert connection.getresponse().status == status
        finally:
            connection.close()


def test_the_streams_beside_all_of_this_are_identical_to_the_token(
    server: TorchServe, neighbours: Neighbours, ranks_before: dict[int, Any]
) -> None:
    neighbours.stop()
    assert neighbours.errors == []
    for alone, seen in zip(neighbours.alone, neighbours.seen, strict=True):
        assert len(alone) > 10
        assert seen
        assert all(tokens == alone for tokens in seen)
    assert server.ranks() == ranks_before, "a worker was started again"
    assert "Traceback" not in (server.logs / "model_log.log").read_text()


def test_logs_hold_no_text_of_users_and_no_text_forges_a_metric(server: TorchServe) -> None:
    """Most rows with a MARKER were sent twice."""
    logs = {path.name: path.read_bytes() for path in server.logs.rglob("*") if path.is_file()}
    assert {"model_log.log", "ts_log.log", "access_log.log", "console.log"} <= logs.keys()
    assert [name for name, text in logs.items() if MARKER.encode() in text] == []
