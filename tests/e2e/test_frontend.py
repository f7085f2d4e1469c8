"""What TorchServe's frontend makes of us on its less trodden ways: gRPC, a full queue, connections that are to end."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.e2e.torchserve_rig import PREDICT, TorchServe, convert, package, serve
from tests.tiny_llama2 import (
    ENDLESS,
    LONG_REQUEST,
    PASSAGE_REQUEST,
    REST_OF_PASSAGE,
    VERY_LONG_REQUEST,
    VERY_LONG_SEQ_LEN,
)
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

NUM_SLOTS = 4
QUEUE_SIZE = 40
VERY_LONG_WHOLE = {**VERY_LONG_REQUEST, "stream": False}


@pytest.fixture(scope="module")
def server(tiny_llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    work = tmp_path_factory.mktemp("model")
    convert(tiny_llama2, work)
    limits = {"max_seq_len": VERY_LONG_SEQ_LEN, "max_batch_size": NUM_SLOTS}
    store = package(work, config={"batchSize": NUM_SLOTS, "jobQueueSize": QUEUE_SIZE}, handler=limits)
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


@contextmanager
def a_neighbour(server: TorchServe) -> Iterator[None]:
    """A client that streams all the time, and is held to every token; no rank may end."""
    ranks = server.ranks()
    begun, enough = threading.Event(), threading.Event()

    def read() -> Iterator[dict[str, Any]]:
        with server.stream(LONG_REQUEST) as stream:
            for _, chunk in stream:
                begun.set()
                yield chunk
                if enough.is_set():
                    break

    def read_on() -> list[str]:
        texts = []
        while not enough.is_set():
            texts.append("".join(chunk["text"] for chunk in read()))
        return texts

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_on)
        try:
            assert begun.wait(PATIENCE_S)
            yield
        finally:
            enough.set()
        texts = reading.result(PATIENCE_S)
    assert all((" tick tock" * 2000).startswith(text) for text in texts)
    assert server.ranks() == ranks


# --- gRPC

Call = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def protos() -> Any:
    return grpc.protos_and_services("tests/e2e/inference.proto")


@pytest.fixture(params=["Predictions", "StreamPredictions"])
def call(request: pytest.FixtureRequest, server: TorchServe, protos: Any) -> Iterator[Call]:
    """What one of gRPC's calls answers to an input, each message parsed."""
    messages, services = protos
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        method = getattr(services.InferenceAPIsServiceStub(channel), request.param)

        def ask(**parameters: bytes) -> list[dict[str, Any]]:
            answer = method(messages.PredictionsRequest(model_name="llama", input=parameters), timeout=PATIENCE_S)
            return [json.loads(one.prediction) for one in ([answer] if request.param == "Predictions" else answer)]

        yield ask


@pytest.mark.parametrize("key", ["data", "body"])
def test_over_grpc_an_answer_is_what_it_is_over_http(server: TorchServe, call: Call, key: str) -> None:
    with a_neighbour(server):
        (answer,) = call(**{key: json.dumps(PASSAGE_REQUEST).encode()})

    assert answer == server.post(PASSAGE_REQUEST).json()
    assert answer["text"] == REST_OF_PASSAGE


def test_over_grpc_what_cannot_be_served_is_refused_and_touches_nobody(server: TorchServe, call: Call) -> None:
    refusals = {
        "stream_not_supported": {"data": json.dumps({**PASSAGE_REQUEST, "stream": True}).encode()},
        "invalid_type": {"data": b'{"prompt": 5}'},
        "invalid_json": {"data": b"not json"},
        "invalid_input": {"data": b'{"prompt": "Hi"}', "max_new_tokens": b"5"},
        "unknown_field": {"data": b'{"prompt": "Hi", "max_tokens": 5}'},
    }
    with a_neighbour(server):
        answers = {code: call(**parameters) for code, parameters in refusals.items()}
        answers["invalid_input "] = call()

    for code, (answer,) in answers.items():
        assert (answer["error"]["code"], answer["error"]["status"]) == (code.strip(), 400)


def test_a_grpc_client_that_leaves_touches_nobody(server: TorchServe, call: Call, protos: Any) -> None:
    messages, services = protos
    # Short, since TorchServe does not report that a gRPC client has left, and later tests need all slots.
    body = {**LONG_REQUEST, "stream": False, "max_new_tokens": 2000}
    request = messages.PredictionsRequest(model_name="llama", input={"data": json.dumps(body).encode()})
    with a_neighbour(server):
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub = services.InferenceAPIsServiceStub(channel)
            for method in (stub.Predictions, stub.StreamPredictions):
                running = method.future(request) if method is stub.Predictions else method(request)
                running.cancel()
        assert call(data=json.dumps(PASSAGE_REQUEST).encode())[0]["text"] == REST_OF_PASSAGE


def test_nothing_of_torchserve_listens_beyond_this_host(server: TorchServe) -> None:
    listening = [one for one in server.frontend().net_connections("inet") if one.status == psutil.CONN_LISTEN]

    assert server.grpc_port in {one.laddr.port for one in listening}
    assert {one.laddr.ip.removeprefix("::ffff:") for one in listening} == {"127.0.0.1"}


# --- a full server


def send(server: TorchServe, payload: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=PATIENCE_S)
    connection.request("POST", PREDICT, json.dumps(payload))
    return connection


def test_new_requests_do_not_wait_for_those_whose_clients_have_left(server: TorchServe) -> None:
    """To generate for them all would take many times PATIENCE_S. As many new ones as there are places: the frontend
    does not say whose client has gone while a place is free. It may have read some of the new ones first."""
    request = {**PASSAGE_REQUEST, "max_new_tokens": 1}
    long = {**VERY_LONG_WHOLE, "prompt": " ".join([ENDLESS] * 7), "n": NUM_SLOTS}  # no other test asks with this prompt
    num_prompt = server.post({**long, "max_new_tokens": 1}).json()["usage"]["prompt_tokens"]
    connections = [send(server, long) for _ in range(2 * NUM_SLOTS)]
    begun, _, _ = select.select([connection.sock for connection in connections], [], [], PATIENCE_S)
    assert begun
    for connection in connections:
        connection.close()

    with ThreadPoolExecutor(NUM_SLOTS) as pool:

        def are_all_cancelled() -> bool:
            answers = pool.map(lambda _: server.post(request, timeout=PATIENCE_S), range(NUM_SLOTS))
            assert {answer.status for answer in answers} == {200}
            log = (server.logs / "model_log.log").read_text()
            return log.count(f" 499 cancelled: {num_prompt} tokens in") == len(connections)

        assert wait_until(are_all_cancelled)


def test_every_client_of_a_full_queue_gets_an_answer_in_json(server: TorchServe) -> None:
    request = {**PASSAGE_REQUEST, "max_new_tokens": 5}
    with ThreadPoolExecutor(3 * QUEUE_SIZE) as pool:
        with ExitStack() as running:
            for _ in range(NUM_SLOTS):
                next(iter(running.enter_context(server.stream(VERY_LONG_REQUEST))))
            asked = [pool.submit(server.post, request) for _ in range(3 * QUEUE_SIZE)]
            assert wait_until(lambda: sum(one.done() for one in asked) >= 2 * QUEUE_SIZE, PATIENCE_S)
        answers = [one.result() for one in asked]

    refused = [answer for answer in answers if answer.status == 503]
    assert len(refused) == 2 * QUEUE_SIZE
    assert {answer.status for answer in answers} == {200, 503}
    assert {answer.headers.get_content_type() for answer in answers} == {"application/json"}
    assert all(answer.json() for answer in answers)


def test_answers_are_the_same_when_all_places_are_taken(server: TorchServe) -> None:
    """Then they begin with their first token, so that the frontend says whose client has gone."""
    request = {"prompt": ENDLESS, "max_new_tokens": 500, "temperature": 0}
    connections = [send(server, request) for _ in range(2 * NUM_SLOTS)]
    responses = [connection.getresponse() for connection in connections]
    answers = [json.loads(response.read()) for response in responses]

    assert {answer["text"] for answer in answers} == {" tick tock" * 250}
    assert {response.status for response in responses} == {200}
    assert {response.headers.get_content_type() for response in responses} == {"application/json"}
    assert "chunked" in {response.headers["transfer-encoding"] for response in responses}


# --- connections that are to end


def receive(server: TorchServe, payload: object, version: str, headers: str, ends: bytes) -> bytes:
    """All that comes until it ends so, byte by byte as a client without an HTTP library sees it."""
    body = json.dumps(payload).encode()
    head = f"POST {PREDICT} HTTP/{version}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.inference_port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while not received.endswith(ends):
            more = connection.recv(1 << 16)
            assert more, f"the connection ends after {received!r}"
            received += more
    return received


CONNECTIONS = [("1.1", "Host: localhost\r\nConnection: close\r\n"), ("1.0", ""), ("1.0", "Host: localhost\r\n")]


@pytest.mark.parametrize(("version", "headers"), CONNECTIONS)
def test_a_stream_says_where_it_ends_whatever_is_to_become_of_the_connection(
    server: TorchServe, version: str, headers: str
) -> None:
    received = receive(server, {**PASSAGE_REQUEST, "stream": True}, version, headers, b"\r\n0\r\n\r\n")

    assert b"transfer-encoding: chunked" in received
    assert b'"finish_reason":"stop"' in received


@pytest.mark.parametrize(("version", "headers"), CONNECTIONS)
def test_a_whole_answer_has_its_length_whatever_is_to_become_of_the_connection(
    server: TorchServe, version: str, headers: str
) -> None:
    head, _, body = receive(server, PASSAGE_REQUEST, version, headers, b"}\n").partition(b"\r\n\r\n")

    assert json.loads(body)["text"] == REST_OF_PASSAGE
    assert f"content-length: {len(body)}\r\n".encode() in head


# --- The last test: TorchServe gets back neither the place of such a call nor, if a rank dies, the worker.


def test_a_sequence_over_grpc_fails_and_touches_nobody(server: TorchServe, protos: Any) -> None:
    messages, services = protos
    data = {"data": json.dumps(PASSAGE_REQUEST).encode()}
    request = messages.PredictionsRequest(model_name="llama", input=data, sequence_id="one")
    with a_neighbour(server), grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        with pytest.raises(grpc.RpcError):
            list(services.InferenceAPIsServiceStub(channel).StreamPredictions2(iter([request]), timeout=PATIENCE_S))
        assert server.post(PASSAGE_REQUEST).json()["text"] == REST_OF_PASSAGE
