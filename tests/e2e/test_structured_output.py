"""Structured output and tool calls with the official clients: a real TorchServe with the demo's model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from tests.e2e.torchserve_rig import TorchServe
from tests.schemas import SCHEMAS
from tests.waiting import PATIENCE_S

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "Describe the weather in Paris."}]
SAMPLED = {"model": "llama", "temperature": 1.0, "max_tokens": 120}
NUM_ANSWERS = 200
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=-20, le=40)


@pytest.fixture(scope="module")
def client(demo_server: TorchServe) -> Iterator[Any]:
    url = f"http://127.0.0.1:{demo_server.inference_port}/predictions/llama/1.0/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(demo_server: TorchServe) -> Iterator[Any]:
    url = f"http://127.0.0.1:{demo_server.inference_port}/predictions/llama/1.0"
    with anthropic.Anthropic(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


def answers_to(client: Any, name: str, seed: int) -> list[str]:
    """The texts of the answers that end with stop."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMAS[name]}}
    done = client.chat.completions.create(messages=QUESTION, response_format=form, n=3, seed=seed, **SAMPLED)
    return [choice.message.content for choice in done.choices if choice.finish_reason == "stop"]


def test_two_hundred_sampled_answers_are_valid_under_their_schemas(client: Any) -> None:
    found: dict[str, list[str]] = {name: [] for name in SCHEMAS}
    with ThreadPoolExecutor(4) as threads:
        for seed in range(0, 300, 10):
            for name, texts in zip(SCHEMAS, threads.map(lambda name: answers_to(client, name, seed), SCHEMAS)):  # noqa: B023, B905
                found[name] += texts
            if sum(map(len, found.values())) >= NUM_ANSWERS:
                break
    assert sum(map(len, found.values())) >= NUM_ANSWERS
    assert sum(map(bool, found.values())) >= 20, "answers under almost every schema end"
    for name, texts in found.items():
        validator = jsonschema.Draft202012Validator(SCHEMAS[name])
        for text in texts:
            validator.validate(json.loads(text))


def test_the_client_parses_an_answer_into_a_model(client: Any) -> None:
    chat = client.chat.completions.parse(messages=QUESTION, response_format=Weather, seed=1, **SAMPLED)
    assert isinstance(chat.choices[0].message.parsed, Weather)
    response = client.responses.parse(model="llama", input="The weather in Paris?", text_format=Weather, temperature=1)
    assert isinstance(response.output_parsed, Weather)


def test_completions_follow_vllm_s_fields(client: Any) -> None:
    done = client.completions.create(
        **{**SAMPLED, "prompt": "The sky is", "seed": 1, "n": 4},
        extra_body={"structured_outputs": {"choice": [" blue", " grey"]}},
    )
    assert {choice.text for choice in done.choices} <= {" blue", " grey"}
    done = client.completions.create(
        **{**SAMPLED, "prompt": "My number is", "seed": 1}, extra_body={"guided_regex": " [0-9]{3}-[0-9]{4}"}
    )
    assert len(done.choices[0].text) == 9


REGEX = "[0-9]{3}-[0-9]{4}"
DIGITS = 'root ::= "No. " [0-9] [0-9]'


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"extra_body": {"structured_outputs": {"regex": REGEX}}}, REGEX),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "yes|no"),
        ({"extra_body": {"structured_outputs": {"grammar": DIGITS}}}, "No. [0-9]{2}"),
        ({"extra_body": {"structured_outputs": {"json": {"enum": [1, 2]}}}}, "[12]"),
        ({"extra_body": {"guided_json": {"enum": [1, 2]}}}, "[12]"),
        ({"extra_body": {"grammar": DIGITS}}, "No. [0-9]{2}"),
        ({"response_format": {"type": "json_object", "schema": {"enum": [1, 2]}}}, "[12]"),
    ],
    ids=str,
)
def test_chats_have_the_form_by_whatever_name_it_is_asked_for(
    client: Any, fields: dict[str, Any], pattern: str
) -> None:
    whole = client.chat.completions.create(messages=QUESTION, seed=1, **SAMPLED, **fields)
    stream = client.chat.completions.create(messages=QUESTION, seed=1, stream=True, **SAMPLED, **fields)
    text = whole.choices[0].message.content
    assert re.fullmatch(pattern, text), text
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == text


def test_an_object_without_a_schema_is_an_object(client: Any) -> None:
    """A small model may not come to its end."""
    form = {"type": "json_object"}
    done = client.chat.completions.create(messages=QUESTION, response_format=form, n=8, seed=1, **SAMPLED)
    for choice in done.choices:
        assert choice.message.content.lstrip().startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_the_other_dialects_have_the_form(client: Any, claude: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": PARAMETERS}}
    whole = claude.messages.create(
        model="llama", max_tokens=120, messages=QUESTION, extra_body={"output_config": form, "seed": 2}
    )
    jsonschema.validate(json.loads(whole.content[0].text), PARAMETERS)
    named = {"format": {**form["format"], "name": "weather"}}
    with client.responses.stream(model="llama", input="The weather in Paris?", text=named, temperature=1) as stream:
        text = stream.get_final_response().output_text
    jsonschema.validate(json.loads(text), PARAMETERS)


def test_a_tool_is_called_and_its_result_goes_back(client: Any) -> None:
    first = client.chat.completions.create(
        messages=QUESTION, tools=[WEATHER, NOW], tool_choice="required", parallel_tool_calls=False, seed=3, **SAMPLED
    )
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    if call.function.name == "get_weather":
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    second = client.chat.completions.create(
        messages=[*QUESTION, choice.message.model_dump(exclude_none=True), result],
        **{**SAMPLED, "temperature": 0, "max_tokens": 20},
        tools=[WEATHER, NOW],
    )
    assert second.choices[0].message.content


def test_streamed_calls_are_those_of_the_whole_answer(client: Any) -> None:
    fields = {
        **SAMPLED,
        "messages": QUESTION,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "seed": 5,
    }
    (call,) = client.chat.completions.create(**fields).choices[0].message.tool_calls
    pieces = []
    with client.chat.completions.create(**fields, stream=True) as stream:
        for chunk in stream:
            for delta in chunk.choices[0].delta.tool_calls or ():
                pieces.append(delta)
    assert (pieces[0].function.name, {piece.index for piece in pieces}) == ("get_weather", {0})
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert len(pieces) > 3, "the arguments arrive as they are generated"


def test_parallel_calls_are_streamed_one_after_the_other(client: Any) -> None:
    """As many as the model likes, which is more than one for some seed."""
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    fields = {**SAMPLED, "messages": QUESTION, "tools": [strict], "tool_choice": "required", "max_tokens": 150}
    for seed in range(20):
        (choice,) = client.chat.completions.create(**fields, seed=seed).choices
        calls = choice.message.tool_calls
        if choice.finish_reason == "tool_calls" and len(calls) > 1:
            break
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert len({call.id for call in calls}) == len(calls) > 1

    async def streamed() -> Any:
        async with (
            openai.AsyncOpenAI(base_url=client.base_url, api_key="none", timeout=PATIENCE_S, max_retries=0) as made,
            made.chat.completions.stream(**fields, seed=seed) as stream,
        ):
            return (await stream.get_final_completion()).choices[0]

    choice = asyncio.run(streamed())
    assert choice.finish_reason == "tool_calls"
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        call.function.arguments for call in calls
    ]


def test_a_model_may_be_left_to_decide_or_be_kept_from_calling(client: Any) -> None:
    fields = {**SAMPLED, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    plain = client.chat.completions.create(**fields)
    kept = client.chat.completions.create(**fields, tools=[WEATHER], tool_choice="none")
    assert kept.choices[0].message.content == plain.choices[0].message.content
    assert kept.choices[0].message.tool_calls is None
    (choice,) = client.chat.completions.create(**fields, tools=[WEATHER], tool_choice="auto").choices
    assert choice.message.content or choice.message.tool_calls


def test_responses_call_functions(client: Any) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    response = client.responses.create(
        model="llama", input="The weather in Rome?", tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (item,) = response.output
    assert (item.type, item.name) == ("function_call", "get_weather")
    jsonschema.validate(json.loads(item.arguments), PARAMETERS)
    fields = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(model="llama", input="The weather in Rome?", **fields) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_response().output
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    jsonschema.validate(json.loads(streamed.arguments), PARAMETERS)
    asked = {"role": "user", "content": "The weather in Rome?"}
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    again = client.responses.create(
        model="llama",
        input=[asked, item, result],
        temperature=0,
        max_output_tokens=10,
        tools=[tool],
        tool_choice="none",
    )
    assert again.output_text


def test_claude_s_client_uses_a_tool(claude: Any) -> None:
    tool = {"name": "get_weather", "input_schema": PARAMETERS}
    fields: dict[str, Any] = {
        "model": "llama",
        "max_tokens": 120,
        "messages": QUESTION,
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    message = claude.messages.create(**fields)
    counted = claude.messages.count_tokens(model="llama", messages=QUESTION, tools=[tool])
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    jsonschema.validate(block.input, PARAMETERS)
    with claude.messages.stream(**fields) as stream:
        (streamed,) = stream.get_final_message().content
    jsonschema.validate(streamed.input, PARAMETERS)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny, 21 degrees"}
    turns = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    again = claude.messages.create(**{**fields, "messages": turns, "tool_choice": {"type": "none"}, "max_tokens": 10})
    assert again.content[0].type == "text"
