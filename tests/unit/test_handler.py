"""What TorchServe's worker sees of the handler. What TorchServe itself does with it is e2e's matter."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import sys

import pytest

from llama_tp.serving.errors import ApiError
from llama_tp.serving.reply import Reply
from llama_tp.torchserve.frontend import PROBE_S
from tests.paths import ROOT

FILE = ROOT / "handler" / "llama_handler.py"


@pytest.fixture(scope="module")
def module():
    """Loaded as TorchServe loads it: from its file, by its bare name."""
    spec = importlib.util.spec_from_file_location("llama_handler", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HTTP = {"Host": "localhost", "Content-Length": "2", "url_path": ""}
SEQUENCE = {"ts_request_sequence_id": "one", "ts_request_sequence_end": "true"}
BATCH_SIZE = 5


class Context:
    """As much of TorchServe's context as a handler may use. `requests`: (id, headers), in batch order."""

    def __init__(self, *requests):
        self.request_ids = dict(enumerate(request_id for request_id, _ in requests))
        self.stopping_criteria = None
        self.statuses = {}
        self.content_types = {}
        self.headers = {}
        self._requests = [headers for _, headers in requests]

    def get_all_request_header(self, index):
        return self._requests[index]

    def set_response_status(self, code=200, phrase="", idx=0):
        self.statuses[idx] = (code, phrase)

    def set_response_content_type(self, idx, value):
        self.content_types[idx] = value

    def set_response_header(self, idx, key, value):
        self.headers.setdefault(idx, {})[key] = value


class Service:
    """A service whose replies are the test's: a list of replies for each poll."""

    def __init__(self, *polls):
        self.polls = list(polls)
        self.open_ids = set()
        self.opened = []
        self.credentials = {}
        self.closed = []
        self.refused = {}
        self.whole_only = set()
        self.generating = set()

    def open(self, request_id, body, route="", *, can_stream=True, credentials=None):
        self.opened.append((request_id, body, route))
        self.credentials[request_id] = credentials
        self.open_ids.add(request_id)
        if not can_stream:
            self.whole_only.add(request_id)

    def refuse(self, request_id, error, route):
        self.refused[request_id] = error
        self.open_ids.add(request_id)

    def is_generating(self, request_id):
        return request_id in self.generating

    def close(self, request_id):
        self.closed.append(request_id)
        self.open_ids.discard(request_id)

    def poll(self, timeout_s):
        assert 0 < timeout_s < 1
        replies = self.polls.pop(0) if self.polls else []
        for reply in replies:
            if reply.is_last:
                self.open_ids.discard(reply.request_id)
        return replies


def handler_of(module, *polls):
    handler = module.LlamaHandler()
    handler.service = Service(*polls)
    handler.batch_size = BATCH_SIZE
    return handler


def batch(*request_ids, headers=HTTP):
    return [{"body": b"{}"} for _ in request_ids], Context(*((request_id, headers) for request_id in request_ids))


def data_batch(*request_ids):
    """As gRPC sends it."""
    headers = {"data": {"content-type": ""}}
    return [{"data": b"{}"} for _ in request_ids], Context(*((request_id, headers) for request_id in request_ids))


def stops(context):
    """What TorchServe learns of each place of the batch."""
    return [criterion("ignored") for criterion in context.stopping_criteria]


def test_the_module_defines_one_class_and_imports_nothing_of_torchserve(module):
    """TorchServe looks for the one class that the module defines, and refuses a module with two."""
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert classes == [module.LlamaHandler]
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert "ts" not in imported
    assert "llama_tp" in imported


def test_a_whole_answer_is_sent_without_a_criterion(module):
    handler = handler_of(module, [Reply("a", b"answer")])
    data, context = batch("a")
    assert handler.handle(data, context) == [b"answer"]
    assert stops(context) == [None]
    assert context.request_ids == {0: "a"}
    assert context.statuses == {0: (200, "OK")}
    assert context.content_types == {0: "application/json"}


def test_a_stream_is_open_until_its_last_chunk(module):
    lines = {"content_type": "application/jsonl"}
    handler = handler_of(
        module,
        [Reply("a", b"1", is_last=False, **lines)],
        [Reply("a", b"2", is_last=False, **lines)],
        [Reply("a", b"3", **lines)],
    )
    seen = []
    for _ in range(3):
        data, context = batch("a")
        seen.append((handler.handle(data, context), stops(context)))
        assert context.content_types == {0: "application/jsonl"}
    assert seen == [([b"1"], [False]), ([b"2"], [False]), ([b"3"], [True])]
    assert [request_id for request_id, _, _ in handler.service.opened] == ["a"]


def test_a_refusal_has_its_status_and_phrase(module):
    handler = handler_of(module, [Reply("a", b"{}", status=415), Reply("b", b"{}", status=503)])
    data, context = batch("a", "b")
    handler.handle(data, context)
    assert context.statuses == {0: (415, "Unsupported Media Type"), 1: (503, "Service Unavailable")}
    assert stops(context) == [None, None]


def test_requests_with_nothing_to_say_are_left_out_and_come_again(module):
    handler = handler_of(module, [Reply("b", b"answer")], [Reply("c", b"late")])
    data, context = batch("a", "b", "c")
    assert handler.handle(data, context) == [b"", b"answer", b""]
    assert context.request_ids == {1: "b"}
    assert len(context.stopping_criteria) == 3
    data, context = batch("a", "c")
    assert handler.handle(data, context) == [b"", b"late"]
    assert context.request_ids == {1: "c"}
    assert sorted(request_id for request_id, _, _ in handler.service.opened) == ["a", "b", "c"]


def test_the_criteria_of_a_batch_are_each_its_own(module):
    handler = handler_of(
        module,
        [Reply("a", b"1", is_last=False), Reply("b", b"whole"), Reply("c", b"1", is_last=False)],
        [Reply("a", b"2"), Reply("c", b"2", is_last=False)],
    )
    data, context = batch("a", "b", "c")
    handler.handle(data, context)
    assert stops(context) == [False, None, False]
    data, context = batch("c", "a")
    assert handler.handle(data, context) == [b"2", b"2"]
    assert stops(context) == [False, True]


def test_a_request_that_has_disappeared_is_closed(module):
    handler = handler_of(module)
    handler.handle(*batch("a", "b"))
    handler.handle(*batch("b", "c"))
    assert handler.service.closed == ["a"]
    assert sorted(request_id for request_id, _, _ in handler.service.opened) == ["a", "b", "c"]
    handler.handle([], Context())
    assert sorted(handler.service.closed) == ["a", "b", "c"]


def test_requests_are_opened_in_the_order_of_the_batch(module):
    """First come, first served; a set's order is another one in every process."""
    handler = handler_of(module)
    request_ids = [f"request {i}" for i in range(20)]
    handler.handle(*batch(*request_ids))
    assert [request_id for request_id, _, _ in handler.service.opened] == request_ids


def test_the_service_gets_the_key_that_a_request_came_with(module):
    handler = handler_of(module)
    headers = ({**HTTP, "Authorization": "Bearer k"}, {**HTTP, "X-Api-Key": "x"}, HTTP)
    data = [{"body": b"{}"} for _ in headers]
    handler.handle(data, Context(*zip("abc", headers, strict=True)))
    assert handler.service.credentials == {"a": "k", "b": "x", "c": None}


def test_bodies_and_routes_reach_the_service(module):
    handler = handler_of(module)
    data = [{"body": b"raw"}, {"data": b"as data"}, {"body": {"prompt": "parsed"}}]
    context = Context(("a", HTTP), ("b", {"host": "x"}), ("c", {**HTTP, "url_path": "v1/completions"}))
    handler.handle(data, context)
    assert handler.service.opened == [
        ("a", b"raw", ""),
        ("b", b"as data", ""),
        ("c", {"prompt": "parsed"}, "v1/completions"),
    ]
    assert handler.service.whole_only == set()


@pytest.mark.parametrize("parameters", [{"prompt": b"a form field"}, {}, {"body": b"{}", "temperature": "1"}], ids=str)
def test_a_form_is_refused_with_the_remedy(module, parameters):
    handler = handler_of(module)
    handler.handle([parameters], Context(("a", HTTP)))
    error = handler.service.refused["a"]
    assert (error.status, error.code) == (415, "form_not_supported")
    assert "application/json" in error.message


# --- gRPC, of which TorchServe says nothing: its requests have no headers


def test_over_grpc_an_answer_is_the_last_of_a_stream(module):
    """StreamPredictions fails on a whole answer, and takes the worker with it."""
    handler = handler_of(module, [Reply("a", b"answer")])
    data, context = data_batch("a")
    assert handler.handle(data, context) == [b"answer"]
    assert stops(context) == [True]
    assert handler.service.opened == [("a", b"{}", "")]
    assert handler.service.whole_only == {"a"}


def test_over_grpc_an_error_names_its_status(module):
    refusal = ApiError(400, "invalid_type", "prompt=5 must be a string", "prompt")
    handler = handler_of(module, [Reply("a", refusal.body(), status=400)])
    data, context = data_batch("a")
    (body,) = handler.handle(data, context)
    assert json.loads(body) == {"error": {**refusal.fields(), "status": 400}}
    assert stops(context) == [True]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({}, "empty"), ({"data": b"{}", "top_p": b"1"}, '"top_p"'), ({"data": b"{}", "url_path": b"v1"}, '"url_path"')],
    ids=str,
)
def test_input_that_would_be_overlooked_is_refused(module, parameters, named):
    handler = handler_of(module)
    handler.handle([parameters], Context(("a", {name: {"content-type": ""} for name in parameters})))
    error = handler.service.refused["a"]
    assert (error.status, error.code) == (400, "invalid_input")
    assert named in error.message
    assert '"data"' in error.message


def test_a_sequence_over_grpc_is_never_answered_and_others_are(module):
    handler = handler_of(module, [], [Reply("b", b"answer")])
    for expected in ({}, {1: "b"}):
        data, context = batch("a", "b")
        context._requests[0] = SEQUENCE
        handler.handle(data, context)
        assert context.request_ids == expected
    assert [request_id for request_id, _, _ in handler.service.opened] == ["b"]


def test_a_sequence_header_over_http_is_a_header_like_any_other(module):
    handler = handler_of(module, [Reply("a", b"answer")])
    data, context = batch("a", headers={**HTTP, **SEQUENCE})
    assert handler.handle(data, context) == [b"answer"]


# --- clients that leave while they wait for a whole answer


@pytest.fixture
def clock(module, monkeypatch):
    """A time that passes when the test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def full_batch(headers=HTTP):
    return batch(*"abcde"[:BATCH_SIZE], headers=headers)


def test_when_all_places_are_taken_a_whole_answer_begins_with_its_first_token(module, clock):
    """For only of an answer that has begun does the frontend say that its client has gone."""
    handler = handler_of(module, [], [], [Reply("a", b"answer")])
    seen = []
    for generating in (set(), {"a"}, {"a"}):
        handler.service.generating = generating
        data, context = full_batch()
        replies = handler.handle(data, context)
        seen.append((context.request_ids, replies[0], stops(context)[0]))
    assert seen == [({}, b"", None), ({0: "a"}, b"", False), ({0: "a"}, b"answer", True)]


def test_an_answer_that_has_begun_is_continued_by_nothing_once_a_second(module, clock):
    handler = handler_of(module)
    handler.service.generating = set("abcde")
    seen = []
    for step in (0.0, PROBE_S / 2, PROBE_S / 2, PROBE_S / 2):
        clock[0] += step
        data, context = full_batch()
        assert handler.handle(data, context) == [b""] * BATCH_SIZE
        seen.append(len(context.request_ids))
    assert seen == [BATCH_SIZE, 0, BATCH_SIZE, 0]
    assert set(context.content_types.values()) <= {"application/json"}


def test_while_there_are_free_places_a_whole_answer_is_sent_whole(module):
    handler = handler_of(module, [], [Reply("a", b"answer")])
    handler.service.generating = {"a"}
    for expected in ({}, {0: "a"}):
        data, context = batch("a", "b")
        handler.handle(data, context)
        assert context.request_ids == expected
    assert stops(context)[0] is None


@pytest.mark.parametrize(
    "headers",
    [{"content-length": "2", "url_path": ""}, {"body": {"content-type": ""}}],
    ids=["HTTP/1.0", "gRPC"],
)
def test_a_client_that_may_not_know_chunks_gets_a_whole_answer(module, headers):
    handler = handler_of(module)
    handler.service.generating = set("abcde")
    data, context = full_batch(headers)
    handler.handle(data, context)
    assert context.request_ids == {}


@pytest.mark.parametrize(
    ("status", "expected"), [(429, {0: {"retry-after": "1"}}), (503, {0: {"retry-after": "1"}}), (400, {})]
)
def test_who_is_refused_for_lack_of_capacity_is_told_when_to_come_again(module, status, expected):
    handler = handler_of(module, [Reply("a", b"{}", status=status)])
    data, context = batch("a")
    handler.handle(data, context)
    assert context.headers == expected


def test_a_reply_brings_its_own_headers(module):
    headers = {"content-security-policy": "default-src 'none'", "referrer-policy": "no-referrer"}
    handler = handler_of(module, [Reply("a", b"<!doctype html>", content_type="text/html", headers=headers)])
    data, context = batch("a")
    handler.handle(data, context)
    assert (context.headers, context.content_types) == ({0: headers}, {0: "text/html"})


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_follower_answers_every_place_of_a_batch_and_looks_at_none(module, size):
    handler = module.LlamaHandler()
    assert handler.handle([object()] * size, object()) == [b""] * size


@pytest.mark.parametrize(("local_rank", "lead"), [("0", True), ("1", False), (None, True)])
def test_local_rank_0_leads(module, monkeypatch, local_rank, lead):
    calls = []
    monkeypatch.setattr(module, "start_service", lambda config, **options: calls.append((config, options)))
    monkeypatch.setattr(module, "quieten_torchserve", lambda: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    context = Context()
    context.model_name = "llama"
    context.manifest = {"model": {"modelVersion": "2.0"}}
    context.model_yaml_config = {"handler": {}}
    context.system_properties = {"model_dir": "/models/llama", "batch_size": 8}
    handler = module.LlamaHandler()
    handler.initialize(context)
    assert handler.batch_size == 8
    named = {"model_name": "llama", "model_version": "2.0", "model_dir": "/models/llama"}
    assert calls == [({"handler": {}}, {**named, "lead": lead})]


def test_why_a_model_is_not_loaded_is_not_repeated_in_tracebacks_save_those_of_a_bug(module, caplog):
    """One reason stood among 80 lines of traceback."""
    root, metrics = logging.getLogger(), logging.getLogger("ts.metrics.caching_metric")
    before = [list(logger.filters) for logger in (root, metrics)]

    def worker(cause):
        """As ts.model_service_worker reports what initialize() raises."""
        try:
            raise RuntimeError(str(cause)) from cause
        except RuntimeError as error:
            logging.exception("Failed to load model %s, exception %s", "llama", error)
        try:
            raise RuntimeError("500 - Unknown exception")
        except RuntimeError:
            logging.error("Backend worker process died.", exc_info=True)

    try:
        module.quieten_torchserve()
        worker(ValueError("batchSize=9 exceeds 8"))
        assert caplog.text.count("\n") == 1
        assert "Backend worker process died." in caplog.text
        caplog.clear()
        worker(AssertionError("a bug"))
        assert "AssertionError: a bug" in caplog.text
    finally:
        root.filters, metrics.filters = before


def test_the_worker_s_line_for_every_step_is_dropped_and_no_other(module, caplog):
    root, metrics = logging.getLogger(), logging.getLogger("ts.metrics.caching_metric")
    before = [list(logger.filters) for logger in (root, metrics)]
    try:
        module.quieten_torchserve()
        with caplog.at_level(logging.INFO):
            for logger in (root, metrics):
                logger.info("Backend received inference at: 1")
                logger.info("skip sending response at: 1")
                logger.info("PredictionTime.ms:1|#ModelName:llama")
                logger.info("another line of %s", logger.name)
    finally:
        root.filters, metrics.filters = before
    lines = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("root", "Backend received inference at: 1") not in lines
    assert ("root", "skip sending response at: 1") not in lines
    assert ("ts.metrics.caching_metric", "PredictionTime.ms:1|#ModelName:llama") not in lines
    assert ("root", "another line of root") in lines
    assert ("ts.metrics.caching_metric", "another line of ts.metrics.caching_metric") in lines


def test_a_python_without_the_library_is_named_as_such(monkeypatch):
    """TorchServe reports an ImportError as a missing handler."""
    monkeypatch.setitem(sys.modules, "llama_tp.torchserve.worker", None)
    spec = importlib.util.spec_from_file_location("llama_handler", FILE)
    with pytest.raises(RuntimeError, match="llama_tp cannot be imported by the Python that runs torchserve"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
