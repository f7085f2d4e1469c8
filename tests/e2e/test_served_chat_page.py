"""The chat page as TorchServe serves it, tokens on, with the demo's model. Its logic: test_chat_page.py."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from llama_tp.resources import HANDLER, LOG_CONFIG, PROPERTIES, resource
from llama_tp.serving.page.assembly import chat_page
from llama_tp.text import load_tokenizer
from llama_tp.torchserve.archive import build_archive
from llama_tp.torchserve.server import TorchServe, free_port_range
from tests.e2e.chromium import executable, launched
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import CONFIG, READY_WITHIN_S
from tests.exposition import Exposition
from tests.optional import imported
from tests.waiting import PATIENCE_S, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.e2e

ROUTE = "/predictions/llama/1.0/chat"
LONG = "Write a very long story about a dragon and a knight, with as many details as possible."


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    executable()  # without a browser, the server is not worth starting
    work = tmp_path_factory.mktemp("chat")
    handler = {"converted_ckpt_dir": "converted_checkpoints", "tokenizer_path": "tokenizer.json", "max_batch_size": 4}
    handler |= {"max_seq_len": 2048, "temperature": 0.0, "abandon_after_s": 600.0, "max_new_tokens": 1500}
    config = work / "model-config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "batchSize": 4, "handler": handler}))
    build_archive(
        model_name="llama",
        config_file=config,
        checkpoint=demo_folder / "converted_checkpoints",
        tokenizer=demo_folder / "weights",
        handler=resource(HANDLER),
        model_store=work / "model_store",
    )
    properties = work / "config.properties"
    on = (
        resource(PROPERTIES)
        .read_text()
        .replace("disable_token_authorization=true", "disable_token_authorization=false")
    )
    properties.write_text(on)
    server = TorchServe(
        model_store=work / "model_store",
        model_name="llama",
        run_dir=work,
        port=free_port_range(3),
        properties=properties,
        log_config=resource(LOG_CONFIG),
    )
    try:
        server.start()
        server.wait_until_ready(READY_WITHIN_S)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def token(server: TorchServe) -> str:
    key: str = json.loads((server.run_dir / "key_file.json").read_text())["inference"]["key"]
    return key


@pytest.fixture
def page(server: TorchServe, token: str) -> Iterator[Page]:
    """As behind a proxy that sends the token for the page, and lets the reader's token through for all else."""

    def as_the_proxy(route: Route) -> None:
        route.continue_(headers={**route.request.headers, "authorization": f"Bearer {token}"})

    with launched() as browser, browser.new_context() as context:
        page = context.new_page()
        page.route(f"**{ROUTE}", as_the_proxy)
        page.goto(f"http://127.0.0.1:{server.port}{ROUTE}")
        yield page


def expect(locator: Locator) -> api.LocatorAssertions:
    api.expect.set_options(timeout=PATIENCE_S * 1000)
    return api.expect(locator)


def send(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer").last


def enter(page: Page, token: str) -> None:
    page.get_by_role("button", name="Enter token").last.click()
    page.get_by_label("Access token").fill(token)
    page.keyboard.press("Enter")


def scrape(server: TorchServe) -> Exposition:
    connection = http.client.HTTPConnection("127.0.0.1", server.listeners.metrics.port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        return Exposition.parse(connection.getresponse().read().decode())
    finally:
        connection.close()


def test_the_page_is_sent_as_it_is_with_its_policy_to_who_has_a_token(server: TorchServe, token: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    document = chat_page()
    for headers, status in (
        ({}, 400),
        ({"Authorization": "Bearer wrong"}, 400),
        ({"Authorization": f"Bearer {token}"}, 200),
    ):
        connection.request("GET", ROUTE, headers=headers)
        response = connection.getresponse()
        body = response.read()
        assert response.status == status
    assert body == document.body
    assert response.headers["content-type"] == document.content_type
    assert {name: response.headers[name] for name in document.headers} == document.headers
    connection.close()


def test_the_official_clients_send_the_token_as_their_key(server: TorchServe, token: str) -> None:
    openai, anthropic = imported("openai"), imported("anthropic")
    url = f"http://127.0.0.1:{server.port}/predictions/llama/1.0"
    asked: dict[str, Any] = {"model": "llama", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token) as client:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == ANSWER
        with pytest.raises(openai.BadRequestError):  # TorchServe's own status
            client.with_options(api_key="wrong").models.list()
    with anthropic.Anthropic(base_url=url, auth_token=token) as client:
        assert client.messages.create(**asked).content[0].text == ANSWER


def test_a_question_is_answered_once_the_token_is_entered(
    server: TorchServe, page: Page, token: str, demo_folder: Path
) -> None:
    expect(page.get_by_role("alert").filter(has_text="The server wants a token")).to_be_visible()
    send(page, QUESTION)
    expect(answer(page)).to_contain_text("The token is missing, wrong, or has expired.")
    enter(page, "wrong")
    expect(answer(page)).to_contain_text("The token is missing, wrong, or has expired.")
    enter(page, token)
    expect(answer(page).locator(".prose")).to_have_text(ANSWER)
    expect(page.get_by_role("heading", level=1)).to_have_text("llama 2,048 tokens of context")
    tokenizer = load_tokenizer(demo_folder / "converted_checkpoints")
    expect(answer(page).locator(".stats")).to_contain_text(f"{len(tokenizer.encode(ANSWER))} tokens")
    expect(answer(page).locator(".stats")).to_have_text(re.compile(r"first token after [\d.]+ s$"))

    page.get_by_role("button", name="Regenerate answer").click()
    expect(answer(page).locator(".versions")).to_have_text("2 / 2")
    expect(answer(page).locator(".prose")).to_have_text(ANSWER)

    page.get_by_role("article", name="You").hover()
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("What is the capital of Italy?")
    page.keyboard.press("Enter")
    expect(answer(page).locator(".prose")).to_contain_text("Rome")


def test_a_stopped_answer_is_cancelled_in_the_engine_and_then_continued(
    server: TorchServe, page: Page, token: str
) -> None:
    before = scrape(server).value("llama_tp_request_success_total", finished_reason="cancelled")
    enter(page, token)
    expect(page.get_by_role("heading", level=1)).to_contain_text("llama")
    send(page, LONG)
    expect(answer(page).locator(".prose")).to_have_text(re.compile(r"(\w+\W+){20}"))
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("Stopped.")
    expect(answer(page).locator(".stats")).to_have_text(re.compile(r"[\d.]+ tokens/sfirst token after [\d.]+ s$"))

    def is_cancelled() -> bool:
        metrics = scrape(server)
        cancelled = metrics.value("llama_tp_request_success_total", finished_reason="cancelled") - before
        return cancelled == 1 and metrics.value("llama_tp_num_requests_running") == 0

    assert wait_until(is_cancelled), "the page makes TorchServe report it; the engine would go on for abandon_after_s"
    text = answer(page).locator(".prose").inner_text()
    page.get_by_role("button", name="Continue answer").click()
    api.expect(answer(page).locator(".prose")).not_to_have_text(text, timeout=PATIENCE_S * 1000)
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("Stopped.")
    assert answer(page).locator(".prose").inner_text().startswith(text)


def test_the_server_s_own_words_are_shown_when_it_refuses(page: Page, token: str) -> None:
    enter(page, token)
    expect(page.get_by_role("heading", level=1)).to_contain_text("llama")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("5000")
    page.get_by_role("button", name="Done").click()
    send(page, "Hello")
    expect(answer(page)).to_contain_text("The conversation is too long for this model")
    expect(answer(page)).to_contain_text("5000")
    expect(page.get_by_role("article", name="You")).to_contain_text("Hello")
