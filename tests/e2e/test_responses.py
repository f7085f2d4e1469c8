"""The official openai client's responses against a real TorchServe with the demo's model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from llama_tp.text import Tokenizer
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import TorchServe
from tests.waiting import PATIENCE_S

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.e2e

SAMPLED = {"temperature": 1.0, "max_output_tokens": 24, "extra_body": {"seed": 5}}


def options(server: TorchServe) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.inference_port}/predictions/llama/1.0/v1"
    return {"base_url": url, "api_key": "none", "timeout": PATIENCE_S, "max_retries": 0}


@pytest.fixture(scope="module")
def client(demo_server: TorchServe) -> Iterator[Any]:
    with openai.OpenAI(**options(demo_server)) as made:
        yield made


def fields(**others: Any) -> dict[str, Any]:
    return {"model": "llama", "input": QUESTION, "temperature": 0, **others}


def ask(client: Any, **others: Any) -> Any:
    return client.responses.create(**fields(**others))


def test_a_question_is_answered(client: Any, demo_tokenizer: Tokenizer) -> None:
    raw = client.responses.with_raw_response.create(**fields(metadata={"a": "b"}))
    response = raw.parse()
    assert response.id == f"resp_{raw.headers['x-request-id']}"
    assert (response.status, response.output_text, response.model) == ("completed", ANSWER, "llama")
    assert (response.metadata, response.temperature, response.store) == ({"a": "b"}, 0, False)
    usage = response.usage
    assert usage.output_tokens == len(demo_tokenizer.encode(ANSWER))
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert ask(client).usage.input_tokens_details.cached_tokens > 0, "the same prompt was asked before"


def test_a_conversation_goes_on_with_the_client_s_own_items(client: Any) -> None:
    first = ask(client)
    again = {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
    assert ask(client, input=[again]).output_text == ANSWER
    second = ask(client, input=[again, *first.output, {"role": "user", "content": "Are you sure?"}])
    assert second.output_text
    instructed = ask(client, instructions="Be brief.")
    assert instructed.instructions == "Be brief."
    assert instructed.usage.input_tokens != first.usage.input_tokens


def test_an_answer_that_is_cut_off_is_incomplete(client: Any) -> None:
    response = ask(client, max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text == "The capital"
    assert [event.type for event in ask(client, max_output_tokens=2, stream=True)][-1] == "response.incomplete"


def test_the_stream_helper_makes_the_whole_response(client: Any) -> None:
    whole = ask(client)
    with client.responses.stream(**fields()) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text == ANSWER
    assert (final.status, final.usage.output_tokens) == (whole.status, whole.usage.output_tokens)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == ANSWER
    assert len(deltas) > 3


def test_the_events_of_a_stream_are_in_the_api_s_order(client: Any) -> None:
    whole = ask(client, **SAMPLED)
    events = list(ask(client, **SAMPLED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", f"{whole.status}"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    assert events[-1].response.output_text == whole.output_text


def test_a_long_instruction_comes_back_in_pieces(client: Any) -> None:
    """The first events repeat it, and have more bytes than a chunk may have; é and the escapes are cut anywhere."""
    request = {"instructions": "Be brief.", "metadata": {"a": 'é"\n' * 60_000}, "max_output_tokens": 1}
    events = list(ask(client, **request, stream=True))
    assert events[0].response.metadata == events[-1].response.metadata == request["metadata"]
    assert ask(client, **request).metadata == request["metadata"]


def test_the_asynchronous_client_gets_the_same(demo_server: TorchServe, client: Any) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(**options(demo_server)) as made:
            whole = await made.responses.create(**fields())
            async with made.responses.stream(**fields()) as stream:
                streamed = await stream.get_final_response()
            return [whole.output_text, streamed.output_text]

    assert asyncio.run(both()) == [ANSWER, ANSWER]


def test_logprobs_are_included_on_request(client: Any) -> None:
    include = ["message.output_text.logprobs"]
    (item,) = ask(client, include=include, top_logprobs=2).output
    logprobs = item.content[0].logprobs
    assert "".join(one.token for one in logprobs) == ANSWER
    assert all(one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 2 for one in logprobs)


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as unsupported:
        ask(client, previous_response_id="resp_1", stream=True)
    assert (unsupported.value.param, unsupported.value.code) == ("previous_response_id", "unsupported_value")
    with pytest.raises(openai.BadRequestError) as stored:
        ask(client, store=True)
    assert stored.value.param == "store"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, max_output_tokens=100_000)
    assert (long.value.param, long.value.code) == ("max_output_tokens", "context_length_exceeded")
