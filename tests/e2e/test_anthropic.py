"""The official anthropic client against a real TorchServe with the demo's model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from llama_tp.text import Tokenizer
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import TorchServe
from tests.waiting import PATIENCE_S

anthropic = pytest.importorskip("anthropic")

pytestmark = pytest.mark.e2e

ASKED = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0}  # the client's newest version has no parameter for it
SAMPLED = {"max_tokens": 24, "extra_body": {"temperature": 1.0, "seed": 5}}


def options(server: TorchServe) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.inference_port}/predictions/llama/1.0"
    return {"base_url": url, "api_key": "none", "timeout": PATIENCE_S, "max_retries": 0}


@pytest.fixture(scope="module")
def client(demo_server: TorchServe) -> Iterator[Any]:
    with anthropic.Anthropic(**options(demo_server)) as made:
        yield made


def fields(**others: Any) -> dict[str, Any]:
    return {"model": "llama", "max_tokens": 64, "messages": ASKED, "extra_body": GREEDY, **others}


def ask(client: Any, **others: Any) -> Any:
    return client.messages.create(**fields(**others))


def test_a_question_is_answered(client: Any, demo_tokenizer: Tokenizer) -> None:
    raw = client.messages.with_raw_response.create(**fields())
    message = raw.parse()
    assert message.id == f"msg_{raw.headers['x-request-id']}"
    assert (message.type, message.role, message.model) == ("message", "assistant", "llama")
    (block,) = message.content
    assert (block.type, block.text) == ("text", ANSWER)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len(demo_tokenizer.encode(ANSWER))
    num_prompt = client.messages.count_tokens(model="llama", messages=ASKED).input_tokens
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == num_prompt
    assert ask(client).usage.cache_read_input_tokens > 0, "the same prompt was asked before"


def test_contents_may_be_blocks_and_there_may_be_a_system_prompt(client: Any) -> None:
    block = {"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}
    assert ask(client, messages=[{"role": "user", "content": [block]}]).content[0].text == ANSWER
    counted = [
        client.messages.count_tokens(model="llama", messages=ASKED, **extra).input_tokens
        for extra in ({"system": "Be brief."}, {"system": [{"type": "text", "text": "Be brief."}]}, {})
    ]
    assert counted[0] == counted[1] != counted[2]
    assert ask(client, system="Be brief.", max_tokens=1).stop_reason == "max_tokens"


def test_a_message_says_which_sequence_stopped_it(client: Any) -> None:
    message = ask(client, stop_sequences=["London", " France"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (
        *("The capital of", "stop_sequence"),
        " France",
    )
    with client.messages.stream(**fields(stop_sequences=["London", " France"])) as stream:
        streamed = stream.get_final_message()
    assert (streamed.content[0].text, streamed.stop_sequence) == ("The capital of", " France")


def test_an_answer_that_has_begun_is_continued(client: Any) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "The capital of France"}]
    assert ask(client, messages=begun).content[0].text == " is Paris."


def test_a_conversation_goes_on_with_the_client_s_own_answer(client: Any) -> None:
    first = ask(client)
    messages = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Are you sure?"}]
    assert ask(client, messages=messages).content[0].text


def test_the_stream_helper_makes_the_whole_message(client: Any) -> None:
    whole = ask(client, **SAMPLED)
    with client.messages.stream(**fields(**SAMPLED)) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == whole.content[0].text
    assert len(texts) > 3
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, whole.stop_reason)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == (
        whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    )


def test_the_events_of_a_stream_are_in_the_api_s_order(client: Any) -> None:
    kinds = [event.type for event in ask(client, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_the_asynchronous_client_gets_the_same(demo_server: TorchServe, client: Any) -> None:
    async def both() -> list[str]:
        async with anthropic.AsyncAnthropic(**options(demo_server)) as made:
            whole = await made.messages.create(**fields(**SAMPLED))
            async with made.messages.stream(**fields(**SAMPLED)) as stream:
                streamed = [text async for text in stream.text_stream]
            return [whole.content[0].text, "".join(streamed)]

    whole, streamed = asyncio.run(both())
    assert whole == streamed == ask(client, **SAMPLED).content[0].text


def test_the_beta_interface_that_coding_agents_use_gets_an_answer(client: Any) -> None:
    message = client.beta.messages.create(**fields(), betas=["context-management-2025-06-27"])
    assert message.content[0].text == ANSWER


def test_a_token_may_be_sent_as_coding_agents_do(demo_server: TorchServe) -> None:
    settings = options(demo_server) | {"api_key": None, "auth_token": "none"}
    with anthropic.Anthropic(**settings) as made:
        assert ask(made).content[0].text == ANSWER


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        ask(client, extra_body={"temperature": 3})
    assert bad.value.body["error"] == {
        "type": "invalid_request_error",
        "message": "temperature=3 must be at most 2.0",
    }
    image = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        ask(client, messages=[{"role": "user", "content": [image]}], stream=True)
    with pytest.raises(anthropic.NotFoundError):
        ask(client, model="gpt-4o")
    with pytest.raises(anthropic.BadRequestError, match="context"):
        ask(client, max_tokens=100_000)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.count_tokens(model="llama", messages=[])


def test_hello_is_tokenized_as_it_is_counted(demo_server: TorchServe, client: Any, demo_tokenizer: Tokenizer) -> None:
    for prefix in ("", "v1/"):
        path = f"/predictions/llama/1.0/{prefix}"
        tokens = demo_server.post({"prompt": QUESTION}, path=path + "tokenize").json()
        assert tokens["tokens"] == demo_tokenizer.encode(QUESTION, bos=demo_tokenizer.adds_bos)
        assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 2048)
        text = demo_server.post({"tokens": demo_tokenizer.encode(QUESTION)}, path=path + "detokenize").json()
        assert text == {"prompt": QUESTION}
    chat = demo_server.post({"messages": ASKED}, path="/predictions/llama/1.0/tokenize").json()
    assert chat["count"] == client.messages.count_tokens(model="llama", messages=ASKED).input_tokens
