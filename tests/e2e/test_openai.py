"""The official openai client against a real TorchServe with the demo's model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llama_tp.text import Tokenizer, load_tokenizer
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.e2e.torchserve_rig import TorchServe, package, serve
from tests.optional import imported
from tests.waiting import PATIENCE_S

openai = imported("openai")

pytestmark = pytest.mark.e2e

ASKED = [{"role": "user", "content": QUESTION}]
PROMPT = "Once upon a time"
SAMPLED = {"temperature": 1.0, "seed": 5, "max_tokens": 24}
MAX_WAITING = 4
NUM_SLOTS = 8


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    work = tmp_path_factory.mktemp("model")
    converted = demo_folder / "converted_checkpoints"
    shutil.copytree(converted, work / "converted_checkpoints")
    shutil.copy(converted / "tokenizer.json", work / "tokenizer.model")  # `package` expects it; it is not used
    shutil.copy(converted / "model_args.json", work)
    handler = {
        "tokenizer_path": "converted_checkpoints",
        "kv_cache_memory": "384MiB",
        "dtype": "float32",
        "max_waiting": MAX_WAITING,
        "max_batch_size": NUM_SLOTS,
    }
    store = package(work, config={"batchSize": NUM_SLOTS}, handler=handler)
    with serve(store, tmp_path_factory.mktemp("torchserve")) as running:
        yield running


def options(server: TorchServe) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.inference_port}/predictions/llama/1.0/v1"
    return {"base_url": url, "api_key": "none", "timeout": PATIENCE_S, "max_retries": 0}


@pytest.fixture(scope="module")
def client(server: TorchServe) -> Iterator[Any]:
    with openai.OpenAI(**options(server)) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Tokenizer:
    return load_tokenizer(demo_folder / "converted_checkpoints")


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "llama", "messages": ASKED, **fields})


def complete(client: Any, **fields: Any) -> Any:
    return client.completions.create(**{"model": "llama", "prompt": PROMPT, **fields})


def test_the_model_is_listed_and_retrieved(client: Any) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.max_model_len) == ("llama", "model", 2048)
    assert client.models.retrieve("llama") == listed
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_question_is_answered(client: Any, tokenizer: Tokenizer) -> None:
    raw = client.chat.completions.with_raw_response.create(model="llama", messages=ASKED, temperature=0)
    answer = raw.parse()
    assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
    assert (answer.object, answer.model) == ("chat.completion", "llama")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert answer.usage.completion_tokens == len(tokenizer.encode(ANSWER))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert complete(client, temperature=0, max_tokens=3).object == "text_completion"


def test_a_streamed_chat_is_the_whole_answer(client: Any) -> None:
    whole = chat(client, n=2, **SAMPLED)
    chunks = list(chat(client, n=2, **SAMPLED, stream=True, stream_options={"include_usage": True}))
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
        reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        assert chunk.usage is None
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    usage = chunks[-1].usage
    assert (chunks[-1].choices, usage.total_tokens, usage.completion_tokens) == (
        *([], whole.usage.total_tokens),
        whole.usage.completion_tokens,
    )
    assert usage.prompt_tokens_details.cached_tokens > 0, "the same prompt was asked before"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_is_the_whole_text(client: Any) -> None:
    whole = complete(client, **SAMPLED)
    chunks = list(complete(client, **SAMPLED, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_asynchronous_client_gets_the_same(server: TorchServe, client: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(**options(server)) as made:
            whole = await chat(made, **SAMPLED)
            parts = [chunk.choices[0].delta.content async for chunk in await chat(made, **SAMPLED, stream=True)]
            text = await complete(made, **SAMPLED)
            texts = [chunk.choices[0].text async for chunk in await complete(made, **SAMPLED, stream=True)]
            return [whole.choices[0].message.content, "".join(parts), text.choices[0].text, "".join(texts)]

    whole, streamed, text, streamed_text = asyncio.run(ask())
    assert whole == streamed == chat(client, **SAMPLED).choices[0].message.content
    assert text == streamed_text == complete(client, **SAMPLED).choices[0].text


def test_an_echoed_prompt_comes_with_its_log_probabilities(client: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT, bos=tokenizer.adds_bos)
    for length in (0, 1):
        (choice,) = complete(client, echo=True, logprobs=2, max_tokens=length, temperature=0).choices
        assert choice.text.startswith(PROMPT)
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(logprobs.top_logprobs) == len(ids) + length
        chunks = list(complete(client, echo=True, logprobs=2, max_tokens=length, temperature=0, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        assert [token for part in parts for token in part.tokens] == logprobs.tokens
    (greedy,) = complete(client, max_tokens=1, logprobs=0, temperature=0).choices
    assert logprobs.token_logprobs[-1] == pytest.approx(greedy.logprobs.token_logprobs[0], abs=1e-4)
    extra = {"prompt_logprobs": 1}
    scored = complete(client, max_tokens=1, temperature=0, extra_body=extra).choices[0].prompt_logprobs
    values = [one and one[str(token)]["logprob"] for one, token in zip(scored, ids, strict=True)]
    assert values[1:] == pytest.approx(logprobs.token_logprobs[1 : len(ids)], abs=1e-4)
    answer = chat(client, max_tokens=1, extra_body={**extra, "return_token_ids": True})
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)


def test_several_prompts_are_answered_in_one_request(client: Any, tokenizer: Tokenizer) -> None:
    prompts = [PROMPT, "1, 2, 3,"]
    alone = [complete(client, prompt=prompt, n=2, **SAMPLED) for prompt in prompts]
    expected = [choice.text for one in alone for choice in one.choices]
    for asked in (prompts, [tokenizer.encode(prompt, bos=tokenizer.adds_bos) for prompt in prompts]):
        together = complete(client, prompt=asked, n=2, **SAMPLED)
        assert [choice.text for choice in together.choices] == expected
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        assert together.usage.total_tokens == sum(one.usage.total_tokens for one in alone)
    texts = [""] * 4
    for chunk in complete(client, prompt=prompts, n=2, **SAMPLED, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=["a"] * (MAX_WAITING + 1))
    assert caught.value.param == "prompt"


def test_vllm_s_extensions_change_the_text(client: Any) -> None:
    greedy = {"temperature": 0, "max_tokens": 60}
    text = (
        chat(client, **greedy, extra_body={"include_stop_str_in_output": True}, stop=" is").choices[0].message.content
    )
    assert text.endswith(" is")
    shown = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert chat(client, **greedy, extra_body=shown).choices[0].message.content == ANSWER + "<|im_end|>"
    bare = chat(client, max_tokens=1, extra_body={"add_generation_prompt": False, "return_token_ids": True})
    full = chat(client, max_tokens=1, extra_body={"return_token_ids": True})
    assert full.prompt_token_ids[: len(bare.prompt_token_ids)] == bare.prompt_token_ids != full.prompt_token_ids
    same = chat(client, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert same.usage.prompt_tokens == full.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"chat_template_kwargs": {"messages": []}})
    assert (caught.value.param, caught.value.code) == ("chat_template_kwargs", "invalid_template_variable")
    (allowed,) = complete(
        client, max_tokens=5, extra_body={"allowed_token_ids": [28], "return_token_ids": True}
    ).choices
    assert allowed.token_ids == [28] * 5
    last = complete(client, max_tokens=1, echo=True, extra_body={"truncate_prompt_tokens": 1}).choices[0].text
    assert last.startswith(" time")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, max_tokens=3, stream=True, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks][-1] == 3
    assert all(chunk.usage.total_tokens == 4 + chunk.usage.completion_tokens for chunk in chunks)


def test_logprobs_are_in_the_form_of_each_route(client: Any, tokenizer: Tokenizer) -> None:
    (choice,) = chat(client, temperature=0, logprobs=True, top_logprobs=2).choices
    assert "".join(one.token for one in choice.logprobs.content) == ANSWER
    assert all(
        one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 2 for one in choice.logprobs.content
    )
    (choice,) = complete(client, temperature=0, logprobs=2, max_tokens=5).choices
    tokens = choice.logprobs.tokens
    assert "".join(tokens) == choice.text
    assert choice.logprobs.text_offset == [len("".join(tokens[:at])) for at in range(5)]
    assert [top[token] for top, token in zip(choice.logprobs.top_logprobs, tokens, strict=True)] == (
        choice.logprobs.token_logprobs
    )


def test_vllm_s_fields_are_taken_from_extra_body(client: Any, tokenizer: Tokenizer) -> None:
    extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 12, "ignore_eos": True}
    answer = chat(client, temperature=0, max_tokens=12, extra_body={**extra, "return_token_ids": True})
    (choice,) = answer.choices
    assert answer.usage.completion_tokens == len(choice.token_ids) == 12
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    assert tokenizer.decode(choice.token_ids).startswith(ANSWER)
    text = complete(client, prompt=answer.prompt_token_ids, temperature=0, max_tokens=12).choices[0].text
    assert text == ANSWER
    begun = [*ASKED, {"role": "assistant", "content": "The capital of France"}]
    extra_body = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, messages=begun, temperature=0, extra_body=extra_body).choices[0].message.content == " is Paris."


def test_stop_strings_biases_and_echo(client: Any, tokenizer: Tokenizer) -> None:
    assert chat(client, temperature=0, stop=[" France"]).choices[0].message.content == "The capital of"
    (paris,) = tokenizer.encode(" Paris")
    biased = chat(client, temperature=0, max_tokens=12, logit_bias={str(paris): -100})
    assert "Paris" not in biased.choices[0].message.content
    plain, echoed = (complete(client, temperature=0, max_tokens=9, echo=echo).choices[0].text for echo in (False, True))
    assert echoed == PROMPT + plain
    assert complete(client, prompt=[PROMPT], temperature=0, max_tokens=9).choices[0].text == plain


def test_filters_that_leave_one_token_make_any_seed_greedy(client: Any) -> None:
    greedy = complete(client, temperature=0, max_tokens=9).choices[0].text
    assert complete(client, temperature=2, seed=1, max_tokens=9).choices[0].text != greedy
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert complete(client, temperature=2, seed=1, max_tokens=9, **narrow).choices[0].text == greedy, narrow


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 10}}],
    ids=lambda penalty: str(penalty),
)
def test_penalties_change_the_text(client: Any, penalty: dict[str, Any]) -> None:
    plain, penalized = (complete(client, temperature=0, max_tokens=40, **one).choices[0].text for one in ({}, penalty))
    assert penalized != plain


def test_an_answer_ends_at_its_length_by_either_name_and_at_tokens_of_one_s_own(
    client: Any, tokenizer: Tokenizer
) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, temperature=0, **{name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    (paris,) = tokenizer.encode(" Paris")
    (choice,) = chat(client, temperature=0, extra_body={"stop_token_ids": [paris]}).choices
    assert (choice.message.content, choice.finish_reason) == ("The capital of France is", "stop")


def test_messages_have_roles_names_and_parts(client: Any) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    joined = "What is the capital\nof France?"

    def prompt(*messages: dict[str, Any]) -> list[int]:
        return chat(client, messages=messages, max_tokens=1, extra_body={"return_token_ids": True}).prompt_token_ids

    assert prompt({"role": "user", "content": parts}) == prompt({"role": "user", "content": joined})
    briefly, other = ({"role": role, "content": "Be brief."} for role in ("developer", "system"))
    assert prompt(briefly, *ASKED) == prompt(other, *ASKED) != prompt(*ASKED)
    assert chat(client, messages=[{**ASKED[0], "name": "alice"}], temperature=0).choices[0].message.content == ANSWER


def test_what_could_not_change_the_answer_is_accepted_and_what_could_is_refused(client: Any) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "verbosity": "medium"}
    harmless |= {"reasoning_effort": "none", "extra_body": {"cache_prompt": True, "request_id": "mine", "mirostat": 0}}
    assert chat(client, temperature=0, **harmless).choices[0].message.content == ANSWER
    for refused in ({"store": True}, {"reasoning_effort": "low"}, {"extra_body": {"mirostat": 2}}):
        (name,) = refused.get("extra_body", refused)
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **refused)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_value")


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as unsupported:
        chat(client, reasoning_effort="high", stream=True)
    assert (unsupported.value.param, unsupported.value.code) == ("reasoning_effort", "unsupported_value")
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-4o")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_rate_limit_error(client: Any, stream: bool) -> None:
    """Two streams take all slots. Of two further requests, one takes the whole queue and is answered in the end."""
    endless = {"n": NUM_SLOTS // 2, "max_tokens": 2000, "stream": True, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        for _ in range(2):
            next(stack.enter_context(complete(client, **endless)))
        asked = [pool.submit(complete, client, n=MAX_WAITING, max_tokens=1, stream=stream) for _ in range(2)]
        refused = next(as_completed(asked)).exception()
        stack.close()
        assert sorted(one.exception() is None for one in asked) == [False, True]
    assert isinstance(refused, openai.RateLimitError)
    assert refused.code == "queue_full"
    assert refused.response.headers["retry-after"] == "1"
