"""A real server does what its OpenAPI document says: requests made from the document, answers checked against it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.torchserve_rig import BIN, TorchServe, package_demo, serve
from tests.optional import imported
from tests.schema_strategy import from_schema
from tests.waiting import PATIENCE_S

schemathesis = imported("schemathesis")

pytestmark = pytest.mark.e2e

ROOT = "/predictions/llama/1.0"
VOCAB_SIZE = 49152
NUM_SLOTS = 8
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
)
"""Of schemathesis. Not positive_data_acceptance: a body may be valid under its schema and contradict itself."""


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    limits = {"max_new_tokens": 4, "max_seq_len": 512, "max_waiting": 64, "max_batch_size": NUM_SLOTS}
    store = package_demo(demo_folder, tmp_path_factory.mktemp("model"), **limits)
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: TorchServe) -> dict[str, Any]:
    response = server.request("GET", f"{ROOT}/openapi.json")
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    return response.json()


def test_schemathesis_finds_no_fault(server: TorchServe, document: dict[str, Any], tmp_path: Path) -> None:
    """Values at the limits of all fields, then random ones, valid and invalid."""
    address = f"http://127.0.0.1:{server.inference_port}{ROOT}/openapi.json"
    command = [str(BIN / "schemathesis"), "run", address, "--phases", "coverage,fuzzing", "--max-examples", "20"]
    command += ["--checks", ",".join(CHECKS), "--generation-database", "none", "--no-color", "--seed", "1"]
    command += ["--request-timeout", str(3 * PATIENCE_S)]  # an answer may have as many tokens as the context
    command += ["--include-path-regex", "^/"]  # otherwise it leaves out the document's own route
    before = server.ranks()

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=570, check=False)

    assert done.returncode == 0, done.stdout[-8000:]
    number = len(document["paths"])
    assert f"{number} selected / {number} total" in done.stdout
    assert server.ranks() == before


def settled(value: Any) -> Any:
    """A valid body's part without what a request may not hold here: token ids of a larger vocabulary."""
    if isinstance(value, list):
        return [one % VOCAB_SIZE if type(one) is int else settled(one) for one in value]
    if isinstance(value, dict) and all(key.isdecimal() for key in value):
        return {str(int(key) % VOCAB_SIZE): one for key, one in value.items()}
    return value


DROPPED = {
    *("model", "mode", "dialog", "stream_options", "continue_final_message", "add_generation_prompt", "timeout_s"),
    *("max_completion_tokens", "min_tokens", "min_new_tokens", "echo", "bad_words", "truncate_prompt_tokens"),
    *("response_format", "structured_outputs", "json_schema", "grammar", "text", "output_config", "output_format"),
    *(f"guided_{name}" for name in ("json", "regex", "choice", "grammar")),
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_special_tokens"),
}
"""Fields that seldom agree with each other or with the model."""
TEXT = "Once upon a time"
NOT_IN_VOCABULARY = "\x04\x06\x13\x14\x16\x1d"
"""Characters that the demo's vocabulary lacks: a prompt of nothing else is refused."""
LOGPROBS = "message.output_text.logprobs"


def consistent(body: dict[str, Any]) -> dict[str, Any]:
    """The body without contradictions between its fields, and small enough for the context."""
    kept = {name: settled(value) for name, value in body.items() if name not in DROPPED}
    for name in ("max_tokens", "max_new_tokens", "max_output_tokens"):
        if name in kept:
            kept[name] = 5
    if kept.get("messages"):
        kept["messages"] = [{"role": "user", "content": said(one.get("content"))} for one in kept["messages"]]
        kept.pop("prompt", None)
    elif "input" in kept:
        kept["input"] = said(kept["input"])
    elif "tokens" not in kept:
        kept["prompt"] = prompted(kept.get("prompt"))
    if kept.get("stream"):
        kept.pop("prompt_logprobs", None)
    if kept.get("top_logprobs") is not None:
        kept |= {"include": [LOGPROBS]} if "input" in kept else {"logprobs": True}
    return kept


def said(content: Any) -> Any:
    """A content, or some text instead of one with other parts than text."""
    if not content or (isinstance(content, list) and any(one.get("type") != "text" for one in content)):
        return TEXT
    return content


def prompted(prompt: Any) -> Any:
    """A prompt, or some text instead of one that has no tokens."""
    if isinstance(prompt, list):
        return [prompted(one) if isinstance(one, str) else one for one in prompt] or TEXT
    if isinstance(prompt, str) and not prompt.strip(NOT_IN_VOCABULARY):
        return TEXT
    return prompt or TEXT


def bodies(document: dict[str, Any], route: str) -> st.SearchStrategy[dict[str, Any]]:
    described = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    valid = from_schema(described, document["components"]["schemas"])
    return valid.map(consistent)


POSTED = ("/", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
POSTED += ("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize")


def test_all_routes_with_a_body_are_tried_here(document: dict[str, Any]) -> None:
    assert {route for route, item in document["paths"].items() if "post" in item} == set(POSTED)


@pytest.mark.parametrize("route", POSTED)
def test_a_body_that_is_valid_and_consistent_is_answered(
    server: TorchServe, document: dict[str, Any], route: str
) -> None:
    address = f"http://127.0.0.1:{server.inference_port}{ROOT}"
    operation = schemathesis.openapi.from_dict(document)[route]["POST"]
    answer = document["paths"][route]["post"]["responses"]["200"]["content"]
    # schemathesis reads server-sent events, but not lines of JSON.
    line = answer.get("application/jsonl", {}).get("schema", {})
    lines = jsonschema_rs.Draft202012Validator({**line, "components": document["components"]})

    @settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(body=bodies(document, route))
    def ask(body: dict[str, Any]) -> None:
        case = operation.Case(body=body, media_type="application/json")
        response = case.call(base_url=address, timeout=PATIENCE_S)
        assert response.status_code == 200, (body, response.text)
        case.validate_response(response)
        if response.headers["content-type"] == ["application/jsonl"]:
            for line in response.text.splitlines():
                lines.validate(json.loads(line))

    ask()


@pytest.mark.parametrize("prompt", [*NOT_IN_VOCABULARY, NOT_IN_VOCABULARY, ["Hi", NOT_IN_VOCABULARY]])
def test_a_prompt_that_has_no_tokens_is_refused(server: TorchServe, prompt: Any) -> None:
    response = server.request("POST", f"{ROOT}/v1/completions", json.dumps({"prompt": prompt}).encode())
    error = response.json()["error"]
    assert (response.status, error["code"]) == (400, "empty_prompt")
    assert error["param"] == ("prompt" if isinstance(prompt, str) else "prompt[1]")
