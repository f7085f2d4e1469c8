"""What TorchServe's worker sees of the handler. What TorchServe itself does with it is e2e's matter."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import sys
from pathlib import Path

import pytest

from llama_tp.serving.service import FORM, Reply

FILE = Path(__file__).parents[2] / "handler" / "llama_handler.py"


@pytest.fixture(scope="module")
def module():
    """Loaded as TorchServe loads it: from its file, by its bare name."""
    spec = importlib.util.spec_from_file_location("llama_handler", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Context:
    """As much of TorchServe's context as a handler may use. `requests`: (id, url_path or None), in batch order."""

    def __init__(self, *requests):
        self.request_ids = dict(enumerate(request_id for request_id, _ in requests))
        self.stopping_criteria = None
        self.statuses = {}
        self.content_types = {}
        self._paths = [path for _, path in requests]

    def get_request_header(self, index, key):
        assert key == "url_path"
        return self._paths[index]

    def set_response_status(self, code=200, phrase="", idx=0):
        self.statuses[idx] = (code, phrase)

    def set_response_content_type(self, idx, value):
        self.content_types[idx] = value


class Service:
    """A service whose replies are the test's: a list of replies for each poll."""

    def __init__(self, *polls):
        self.polls = list(polls)
        self.open_ids = set()
        self.opened = []
        self.closed = []

    def open(self, request_id, body, route=""):
        self.opened.append((request_id, body, route))
        self.open_ids.add(request_id)

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
    return handler


def batch(*request_ids, body=b"{}"):
    return [{"body": body} for _ in request_ids], Context(*((request_id, None) for request_id in request_ids))


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
        [Reply("a", b"2", is_first=False, is_last=False, **lines)],
        [Reply("a", b"3", is_first=False, **lines)],
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
        [Reply("a", b"2", is_first=False), Reply("c", b"2", is_first=False, is_last=False)],
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


def test_bodies_and_routes_reach_the_service(module):
    handler = handler_of(module)
    data = [{"body": b"raw"}, {"data": b"as data"}, {"prompt": b"a form field"}, {}, {"body": {"prompt": "parsed"}}]
    context = Context(("a", None), ("b", ""), ("c", None), ("d", None), ("e", "v1/completions"))
    handler.handle(data, context)
    assert sorted(handler.service.opened, key=lambda one: one[0]) == [
        ("a", b"raw", ""),
        ("b", b"as data", ""),
        ("c", FORM, ""),
        ("d", FORM, ""),
        ("e", {"prompt": "parsed"}, "v1/completions"),
    ]


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
    context.model_yaml_config = {"handler": {}}
    context.system_properties = {"model_dir": "/models/llama"}
    module.LlamaHandler().initialize(context)
    assert calls == [({"handler": {}}, {"model_dir": "/models/llama", "lead": lead})]


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
    monkeypatch.setitem(sys.modules, "llama_tp.serving.start", None)
    spec = importlib.util.spec_from_file_location("llama_handler", FILE)
    with pytest.raises(RuntimeError, match="llama_tp cannot be imported by the Python that runs torchserve"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
