"""Bodies in, replies out: a real engine loop with a tiny random model behind the real tokenizer and dialect."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import threading
import time

import pytest
import torch

from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason
from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.model_args import ModelArgs
from llama_tp.serving import reply_size
from llama_tp.serving.access import Access
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.service import LlamaService
from llama_tp.text.chat import chat_format
from tests.tiny_model import engine_of, random_model
from tests.unit.text_fixtures import tiny
from tests.waiting import PATIENCE_S, wait_until

GREEDY = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.0}
DEFAULTS = RequestDefaults(mode="text_completion", max_new_tokens=24, seed=None, sampling=GREEDY)
MAX_SEQ_LEN = 512
NEVER_S = 3600.0
PROMPT = "The quick brown fox"
DIALOG = [{"role": "user", "content": "Where is the fox?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("sentencepiece")


@pytest.fixture(scope="module")
def model(tokenizer):
    vocab_size = tokenizer.vocab_size
    model = random_model(
        ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=vocab_size, multiple_of=32), seed=3
    )
    model.output.weight[list(tokenizer.stop_ids)] = 0  # never among the most probable: no answer ends by chance
    return model


@pytest.fixture
def make_service(model, tokenizer):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loops = []

    def make(*, words=tokenizer, chat=None, abandon_after_s=NEVER_S, served_name=None, access=None, **config):
        engine = engine_of(model, **{"max_seq_len": MAX_SEQ_LEN, **config})
        loops.append(EngineLoop(engine, abandon_after_s=abandon_after_s))
        loops[-1].start()
        names = {"model_name": "llama", "served_name": served_name}
        return LlamaService(
            loops[-1], words, chat or chat_format("llama2", tokenizer), DEFAULTS, **names, access=access
        )

    yield make
    for loop in loops:
        loop.stop()
    torch.set_num_threads(before)


@pytest.fixture
def service(make_service):
    return make_service()


def pause_after(service, num_steps):
    """Further steps wait for the event that this returns: what is open stays open, however fast the machine is."""
    runner, numbers, go_on = service._loop.engine.runner, itertools.count(), threading.Event()
    execute = runner.execute

    def execute_or_wait(plan):
        if plan.chunks and next(numbers) >= num_steps:
            go_on.wait(PATIENCE_S)
        return execute(plan)

    runner.execute = execute_or_wait
    return go_on


_counter = itertools.count()


def open_one(service, request_id, route="", **body):
    service.open(request_id, json.dumps(body).encode(), route)


def collect(service, *request_ids):
    """All replies of each request, up to the last; what every reply promises is checked on the way."""
    replies = {request_id: [] for request_id in request_ids}
    deadline = time.monotonic() + PATIENCE_S
    while not all(some and some[-1].is_last for some in replies.values()):
        assert time.monotonic() < deadline, "no end"
        for reply in service.poll(0.2):
            some = replies[reply.request_id]
            assert not (some and some[-1].is_last), "a reply after the last"
            assert reply.is_last == (reply.request_id not in service.open_ids)
            assert reply.body.endswith(b"\n") or reply.status != 200
            some.append(reply)
    return replies


def ask(service, route="", **body):
    """The one reply to a request that does not stream, parsed, with its status."""
    request_id = f"asked {next(_counter)}"
    open_one(service, request_id, route, **body)
    (reply,) = collect(service, request_id)[request_id]
    assert reply.content_type == "application/json"
    return reply.status, json.loads(reply.body)


def refusal(service, **body):
    status, reply = ask(service, **body)
    return status, reply["error"]["code"], reply["error"]["param"]


def stream(service, **body):
    """The chunks of a stream, parsed."""
    request_id = f"streamed {next(_counter)}"
    open_one(service, request_id, stream=True, **body)
    replies = collect(service, request_id)[request_id]
    assert {reply.content_type for reply in replies} == {"application/jsonl"}
    assert {reply.status for reply in replies} == {200}
    return [json.loads(line) for reply in replies for line in reply.body.splitlines()]


def continuation(tokenizer, ids, prompt=PROMPT):
    """What the ids add to the text of a prompt: the whole decoded, less the prompt."""
    before = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    whole, start = tokenizer.decode([*before, *ids]), tokenizer.decode(before)
    assert whole.startswith(start)
    return whole[len(start) :]


SAMPLED = {"temperature": 1.0, "top_k": 30, "seed": 7, "max_new_tokens": 60}


@pytest.mark.parametrize("params", [{}, SAMPLED, {**SAMPLED, "seed": 8, "top_p": 0.9}], ids=["greedy", "7", "8"])
@pytest.mark.parametrize("asked", [{"prompt": PROMPT}, {"dialog": DIALOG}, {"prompt": [1, 5, 9]}], ids=str)
def test_a_stream_joined_is_the_answer_in_one_piece(service, tokenizer, asked, params):
    status, answer = ask(service, **asked, **params)
    chunks = stream(service, **asked, **params)
    ids = [token for chunk in chunks for token in chunk["ids"]]
    assert status == 200
    assert "".join(chunk["text"] for chunk in chunks) == answer["text"]
    assert answer["text"] == (
        continuation(tokenizer, ids, asked["prompt"]) if "prompt" in asked else tokenizer.decode(ids)
    )
    assert chunks[-1]["usage"] == answer["usage"]
    assert chunks[-1]["finish_reason"] == answer["finish_reason"]
    assert len(ids) == answer["usage"]["completion_tokens"]
    assert all(chunk.keys() == {"text", "ids"} for chunk in chunks[:-1])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"prompt": PROMPT}, " the the"),
        ({"prompt": [1, 40, 41]}, " the the"),
        ({"prompt": [1]}, "the the"),
        ({"dialog": DIALOG}, "the the"),
    ],
    ids=str,
)
def test_a_completion_begins_with_the_space_that_parts_it_from_its_prompt(service, tokenizer, asked, text, streaming):
    (word,) = tokenizer.encode("the")
    body = {**asked, "logit_bias": {str(word): 100}, "max_new_tokens": 2}
    answered = "".join(c["text"] for c in stream(service, **body)) if streaming else ask(service, **body)[1]["text"]
    assert answered == text


def check_alignment(chunks, tokenizer):
    ids, text = [], ""
    for chunk in chunks[:-1]:
        ids += chunk["ids"]
        text += chunk["text"]
        whole = continuation(tokenizer, ids)
        assert whole.startswith(text)
        assert set(whole[len(text) :]) <= {"\ufffd"}


def test_a_chunk_s_text_is_that_of_its_ids(service, tokenizer):
    """But for characters that are not whole yet, which belong to the chunk that completes them."""
    chunks = stream(service, prompt=PROMPT, **{**SAMPLED, "max_new_tokens": 300})
    assert len(chunks) > 3
    check_alignment(chunks, tokenizer)


def test_usage_counts_the_prompt_as_it_was_tokenized_and_every_generated_token(service, tokenizer):
    _, answer = ask(service, prompt=PROMPT, max_new_tokens=5)
    num_prompt = len(tokenizer.encode(PROMPT, bos=True))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 5,
        "total_tokens": num_prompt + 5,
    }
    assert answer["finish_reason"] == "length"
    _, answer = ask(service, dialog=DIALOG, max_new_tokens=1)
    expected = len(tokenizer.encode("[INST] Where is the fox? [/INST]", bos=True))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (expected, 1)


def test_token_ids_are_taken_as_they_are(service, tokenizer):
    _, as_text = ask(service, prompt=PROMPT)
    _, as_ids = ask(service, prompt=tokenizer.encode(PROMPT, bos=True))
    assert as_ids == as_text


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_a_stop_string_ends_the_answer_wherever_the_tokens_are_cut(service, tokenizer, width, streaming):
    chunks = stream(service, prompt=PROMPT, **SAMPLED)
    ids = [token for chunk in chunks for token in chunk["ids"]]
    whole = continuation(tokenizer, ids)
    for at in range(4, len(whole) - width, 7):
        stop = whole[at : at + width]
        if "\ufffd" in stop:
            continue
        body = {"prompt": PROMPT, "stop": [stop, "never in there"], **SAMPLED}
        if streaming:
            chunks = stream(service, **body)
            text, end = "".join(chunk["text"] for chunk in chunks), chunks[-1]
            assert [token for chunk in chunks for token in chunk["ids"]] == ids[: end["usage"]["completion_tokens"]]
        else:
            _, end = ask(service, **body)
            text = end["text"]
        assert text == whole[: whole.index(stop)]
        assert end["finish_reason"] == "stop"
        num_tokens = end["usage"]["completion_tokens"]
        assert stop in continuation(tokenizer, ids[:num_tokens])
        assert stop not in continuation(tokenizer, ids[: num_tokens - 1])


def test_until_min_new_tokens_nothing_stops_an_answer(service, tokenizer):
    chunks = stream(service, prompt=PROMPT, **SAMPLED)
    ids = [token for chunk in chunks for token in chunk["ids"]]
    whole = continuation(tokenizer, ids)
    stop = whole[5]  # one character, so that one token completes it
    _, stopped = ask(service, prompt=PROMPT, stop=stop, **SAMPLED)
    least = stopped["usage"]["completion_tokens"]
    _, answer = ask(service, prompt=PROMPT, stop=stop, min_new_tokens=least, **SAMPLED)
    rest = whole.removeprefix(continuation(tokenizer, ids[:least]))
    assert answer["text"] == continuation(tokenizer, ids[:least]) + rest.split(stop)[0]
    assert ask(service, prompt=PROMPT, stop=stop, min_new_tokens=least - 1, **SAMPLED)[1] == stopped
    body = {"prompt": PROMPT, "stop_token_ids": [ids[3]], **SAMPLED}
    assert ask(service, **body)[1]["usage"]["completion_tokens"] == ids.index(ids[3])
    assert ask(service, min_new_tokens=50, **body)[1]["usage"]["completion_tokens"] >= 50


def test_min_new_tokens_raise_a_default_of_max_new_tokens(service):
    _, answer = ask(service, prompt=PROMPT, min_new_tokens=30)
    assert answer["usage"]["completion_tokens"] == 30 > DEFAULTS.max_new_tokens


def test_stop_token_ids_end_an_answer_and_are_no_part_of_it(service, tokenizer):
    ids = [token for chunk in stream(service, prompt=PROMPT, **SAMPLED) for token in chunk["ids"]]
    before = ids[: ids.index(ids[20])]
    _, answer = ask(service, prompt=PROMPT, stop_token_ids=[ids[20]], ignore_eos=True, **SAMPLED)
    assert (answer["text"], answer["finish_reason"]) == (continuation(tokenizer, before), "stop")
    assert answer["usage"]["completion_tokens"] == len(before)


@pytest.mark.parametrize("asked", [{"prompt": PROMPT}, {"dialog": DIALOG}], ids=str)
def test_an_ignored_eos_does_not_end_an_answer(service, tokenizer, asked):
    body = {**asked, "logit_bias": {str(tokenizer.eos_id): 100}, "max_new_tokens": 5}
    _, answer = ask(service, **body)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 0)
    _, answer = ask(service, ignore_eos=True, **body)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 5)
    _, answer = ask(service, ignore_eos=True, stop_token_ids=[tokenizer.eos_id], **body)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 0)


@pytest.mark.parametrize(
    "asked",
    [{"repetition_penalty": 2}, {"presence_penalty": 2}, {"frequency_penalty": 2}, {"logit_bias": {"7": 50}}],
    ids=str,
)
def test_what_changes_the_logits_changes_the_answer(service, asked):
    body = {"prompt": PROMPT, "max_new_tokens": 60}
    assert ask(service, **asked, **body)[1]["text"] != ask(service, **body)[1]["text"]


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs_are_those_of_the_generated_tokens(service, tokenizer, top):
    body = {"prompt": PROMPT, "logprobs": True, **({} if top is None else {"top_logprobs": top}), **SAMPLED}
    _, plain = ask(service, prompt=PROMPT, **SAMPLED)
    _, answer = ask(service, **body)
    chunks = stream(service, **body)
    logprobs = answer.pop("logprobs")
    assert answer == plain
    assert [record["id"] for record in logprobs] == [token for chunk in chunks for token in chunk["ids"]]
    assert [record for chunk in chunks for record in chunk["logprobs"]] == logprobs
    assert all(len(chunk["logprobs"]) == len(chunk["ids"]) for chunk in chunks)
    joined = b"".join(bytes(record["bytes"]) for record in logprobs)
    assert joined.decode("utf-8", "replace") == answer["text"]
    for record in logprobs:
        assert bytes(record["bytes"]) == tokenizer.token_bytes(record["id"])
        assert len(record["top_logprobs"]) == (top or 0)
        top_values = [one["logprob"] for one in record["top_logprobs"]]
        assert top_values == sorted(top_values, reverse=True)
        assert record["logprob"] <= max(top_values, default=0)


def test_a_backlog_with_logprobs_is_sent_in_smaller_chunks(service):
    body = {"prompt": PROMPT, "logprobs": True, "top_logprobs": 20, **SAMPLED, "max_new_tokens": 200}
    open_one(service, "one", stream=True, **body)
    assert wait_until(lambda: len(service._loop._events) == 200)
    replies = collect(service, "one")["one"]
    sizes = [len(json.loads(reply.body)["ids"]) for reply in replies]
    assert 1 <= sizes[0] < 64
    assert set(sizes[:-1]) == {sizes[0]}
    assert sum(sizes) == 200
    assert max(len(reply.body) for reply in replies) <= reply_size.MAX_CHUNK_BYTES


def test_an_answer_too_large_to_be_sent_is_refused_with_the_remedy(service, monkeypatch):
    monkeypatch.setattr(reply_size, "MAX_ANSWER_BYTES", 100)
    assert refusal(service, prompt=PROMPT, **SAMPLED) == (400, "answer_too_large", "stream")
    assert service.open_ids == set()
    assert stream(service, prompt=PROMPT, **SAMPLED)[-1]["finish_reason"] == "length"


def several(chunks):
    """The choices and the usage that the chunks of a stream amount to; what every line promises is checked."""
    choices = {}
    for chunk in chunks:
        index = chunk.get("index", 0)
        choice = choices.setdefault(index, {"index": index, "text": ""})
        assert "finish_reason" not in choice, "a line after an output's last"
        choice["text"] += chunk["text"]
        choice |= {name: chunk[name] for name in ("finish_reason", "error") if name in chunk}
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert all("finish_reason" in choice for choice in choices.values())
    return [choices[index] for index in sorted(choices)], chunks[-1]["usage"]


@pytest.mark.parametrize("asked", [{"prompt": PROMPT}, {"dialog": DIALOG}], ids=str)
def test_several_outputs_are_those_of_several_requests(service, asked):
    _, answer = ask(service, n=3, **asked, **SAMPLED)
    alone = [ask(service, **asked, **{**SAMPLED, "seed": SAMPLED["seed"] + i})[1] for i in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in answer["choices"]] == [one["text"] for one in alone]
    assert answer["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)
    assert several(stream(service, n=3, **asked, **SAMPLED)) == (answer["choices"], answer["usage"])
    _, with_logprobs = ask(service, n=3, logprobs=True, **asked, **SAMPLED)
    assert [len(choice["logprobs"]) for choice in with_logprobs["choices"]] == [60] * 3


def test_one_output_is_answered_as_ever(service):
    assert ask(service, n=1, prompt=PROMPT, **SAMPLED) == ask(service, prompt=PROMPT, **SAMPLED)
    assert stream(service, n=1, prompt=PROMPT)[-1].keys() == {"text", "ids", "finish_reason", "usage"}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_its_output_alone(service, streaming):
    body = {"prompt": PROMPT, "n": 3, **SAMPLED}
    texts = [choice["text"] for choice in ask(service, **body)[1]["choices"]]
    stop = next(
        texts[0][at : at + 2]
        for at in range(3, 50)
        if "\ufffd" not in texts[0][at : at + 2] and any(texts[0][at : at + 2] not in text for text in texts)
    )
    if streaming:
        choices, usage = several(stream(service, stop=stop, **body))
    else:
        answer = ask(service, stop=stop, **body)[1]
        choices, usage = answer["choices"], answer["usage"]
    for i, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        reason = "stop" if stop in text else "length"
        assert choice == {"index": i, "text": text.split(stop)[0], "finish_reason": reason}
    alone = [ask(service, **{**body, "n": 1, "seed": SAMPLED["seed"] + i}, stop=stop)[1] for i in range(3)]
    assert usage["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)


def test_an_output_that_a_stop_string_has_ended_frees_its_place_while_its_siblings_go_on(make_service):
    service = make_service(max_seq_len=32_768, max_batch_size=2)
    texts = [choice["text"] for choice in ask(service, prompt=PROMPT, n=2, **SAMPLED)[1]["choices"]]
    stop = texts[0][3:15]  # so long that output 1 never has it by chance, however far it gets meanwhile
    assert "\ufffd" not in stop
    body = {"prompt": PROMPT, "n": 2, "stop": stop, **SAMPLED, "max_new_tokens": 30_000}
    open_one(service, "long", **body)
    assert wait_until(lambda: len(service._loop.engine.scheduler.running) == 2)
    assert ask(service, prompt=PROMPT, max_new_tokens=4)[0] == 200, "it got the place of output 0"
    (key,) = service._loop.engine.scheduler.request_ids()
    assert service._loop.engine.scheduler.active_outputs(key) == [1]
    service.close("long")
    assert wait_until(lambda: service._loop.engine.num_requests == 0)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_request_whose_outputs_have_all_stopped_frees_its_place_in_the_engine(make_service, streaming):
    service = make_service(max_seq_len=32_768)
    open_one(
        service, "one", prompt=PROMPT, stop=list("aeio"), stream=streaming, n=3, **{**SAMPLED, "max_new_tokens": 9000}
    )
    *_, last = collect(service, "one")["one"][-1].body.splitlines()
    assert json.loads(last)["usage"]["completion_tokens"] < 3000
    assert wait_until(lambda: service._loop.engine.num_requests == 0)
    assert ask(service, prompt=PROMPT)[0] == 200


def test_the_first_half_of_a_stop_string_is_not_lost_when_the_answer_ends_with_it(service):
    _, answer = ask(service, prompt=PROMPT, **SAMPLED)
    last = answer["text"][-1]
    _, same = ask(service, prompt=PROMPT, stop=[last * 200], **SAMPLED)
    assert same == answer


def test_a_stopped_request_frees_its_place_in_the_engine(make_service):
    service = make_service(max_seq_len=32_768)
    _, answer = ask(service, prompt=PROMPT, **SAMPLED)
    _, stopped = ask(service, prompt=PROMPT, stop=answer["text"][5:7], **{**SAMPLED, "max_new_tokens": 30_000})
    assert stopped["finish_reason"] == "stop"
    assert wait_until(lambda: service._loop.engine.num_requests == 0)


def test_an_id_may_be_used_again_once_its_request_has_ended(service):
    """The engine is ahead of a stop string and of a client that leaves: the next user of the id got those tokens."""
    _, answer = ask(service, prompt=PROMPT, **SAMPLED)
    for _ in range(5):
        open_one(service, "again", prompt=PROMPT, stop=answer["text"][3], **SAMPLED)
        assert json.loads(collect(service, "again")["again"][0].body)["finish_reason"] == "stop"
        open_one(service, "again", prompt=PROMPT, **SAMPLED)
        service.close("again")
        open_one(service, "again", prompt=PROMPT, **SAMPLED)
        assert json.loads(collect(service, "again")["again"][0].body) == answer


def test_a_backlog_is_sent_in_chunks_of_at_most_64_tokens(service, tokenizer):
    open_one(service, "one", prompt=PROMPT, stream=True, **{**SAMPLED, "max_new_tokens": 200})
    assert wait_until(lambda: len(service._loop._events) == 200)
    chunks = [json.loads(reply.body) for reply in collect(service, "one")["one"]]
    assert [len(chunk["ids"]) for chunk in chunks] == [64, 64, 64, 8]
    check_alignment(chunks, tokenizer)
    _, answer = ask(service, prompt=PROMPT, **{**SAMPLED, "max_new_tokens": 200})
    assert "".join(chunk["text"] for chunk in chunks) == answer["text"]
    assert chunks[-1]["usage"] == answer["usage"]


def test_a_default_of_max_new_tokens_is_clipped_and_an_explicit_one_is_kept_or_refused(make_service, tokenizer):
    service = make_service(max_seq_len=32)
    ids = tokenizer.encode(PROMPT, bos=True)
    prompt = (ids * 32)[:20]
    _, answer = ask(service, prompt=prompt)
    assert answer["usage"]["completion_tokens"] == 12
    assert ask(service, prompt=prompt, max_new_tokens=12)[0] == 200
    status, reply = ask(service, prompt=prompt, max_new_tokens=13)
    error = reply["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "max_new_tokens")
    assert all(number in error["message"] for number in ("13", "20", "32", "12"))
    assert ask(service, prompt=(ids * 32)[:31])[1]["usage"]["completion_tokens"] == 1
    assert refusal(service, prompt=(ids * 32)[:32]) == (400, "context_length_exceeded", "prompt")
    long_dialog = [{"role": "user", "content": "fox " * 30}]
    assert refusal(service, dialog=long_dialog) == (400, "context_length_exceeded", "dialog")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"prompt": [1, 10**6]}, 400, "token_out_of_range", "prompt[1]"),
        ({"prompt": [1, 400]}, 400, "token_out_of_range", "prompt[1]"),
        ({"prompt": ""}, 400, "empty_prompt", "prompt"),
        ({}, 400, "missing_field", "prompt"),
        ({"prompt": "a", "dialog": DIALOG}, 400, "conflicting_fields", "dialog"),
        ({"prompt": "a", "temperature": 3}, 400, "invalid_value", "temperature"),
        ({"dialog": [*DIALOG, *DIALOG]}, 400, "invalid_role_order", "dialog[1].role"),
        ({"dialog": [{"role": "robot", "content": "a"}]}, 400, "invalid_role", "dialog[0].role"),
        ({"dialog": [{"role": "user", "content": "[INST]"}]}, 400, "special_tags_not_allowed", "dialog[0].content"),
        ({"dialog": []}, 400, "empty_messages", "dialog"),
        ({"prompt": "a", "stop_token_ids": [2, 400]}, 400, "token_out_of_range", "stop_token_ids[1]"),
        ({"prompt": "a", "logit_bias": {"2": 1, "400": 1}}, 400, "token_out_of_range", "logit_bias.400"),
        ({"prompt": "a", "logit_bias": {"two": 1}}, 400, "invalid_value", "logit_bias.two"),
        ({"prompt": "a", "min_new_tokens": 511}, 400, "context_length_exceeded", "min_new_tokens"),
        (
            {"prompt": "a", "logprobs": True, "top_logprobs": 20, "n": 16, "max_new_tokens": 100},
            *(400, "answer_too_large", "logprobs"),
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_its_only_reply(service, body, status, code, param):
    assert refusal(service, **body) == (status, code, param)
    assert service.open_ids == set()


def test_more_outputs_than_may_ever_wait_are_the_request_s_fault(make_service):
    service = make_service(max_waiting=3)
    assert refusal(service, prompt="a", n=4) == (400, "invalid_value", "n")


@pytest.mark.parametrize("body", [b"", b"not json", b"\x1f\x8b\x08", b"[]", None, 42], ids=repr)
def test_a_body_that_is_no_request_is_answered_with_400(service, body):
    service.open("one", body)
    (reply,) = collect(service, "one")["one"]
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"


def test_a_parsed_body_is_as_good_as_its_bytes(service):
    service.open("one", {"prompt": PROMPT})
    (reply,) = collect(service, "one")["one"]
    assert json.loads(reply.body) == ask(service, prompt=PROMPT)[1]


def test_a_request_that_came_in_a_way_that_cannot_be_served_is_refused_with_the_reason(service):
    service.refuse("one", ApiError(415, "form_not_supported", "send JSON"))
    (reply,) = collect(service, "one")["one"]
    assert (reply.status, reply.is_last) == (415, True)
    assert json.loads(reply.body)["error"]["message"] == "send JSON"


def test_where_no_stream_is_possible_a_stream_is_refused_and_a_whole_answer_is_not(service):
    body = json.dumps({"prompt": PROMPT, "stream": True}).encode()
    service.open("stream", body, can_stream=False)
    (reply,) = collect(service, "stream")["stream"]
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (400, "stream_not_supported")
    assert json.loads(reply.body)["error"]["param"] == "stream"
    service.open("whole", json.dumps({"prompt": PROMPT}).encode(), can_stream=False)
    (reply,) = collect(service, "whole")["whole"]
    assert reply.status == 200


def test_a_request_generates_from_its_first_token_to_its_last_reply(service):
    go_on = pause_after(service, 3)
    assert not service.is_generating("one")
    open_one(service, "one", prompt=PROMPT, max_new_tokens=10)
    assert not service.is_generating("one")
    assert wait_until(lambda: service.poll(0.001) or service.is_generating("one"))
    assert service.is_generating("one"), "it has replied before it was seen to generate"
    go_on.set()
    collect(service, "one")
    assert not service.is_generating("one")
    service.open("refused", b"")
    assert not service.is_generating("refused")


def test_an_unknown_route_is_answered_with_404(service):
    status, reply = ask(service, "v2/completions", prompt=PROMPT)
    assert (status, reply["error"]["code"]) == (404, "unknown_route")
    assert "v2/completions" in reply["error"]["message"]


def test_a_model_that_cannot_chat_says_why(make_service):
    service = make_service(chat="it was never taught to")
    status, reply = ask(service, dialog=DIALOG)
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "chat_not_supported", "dialog")
    assert "it was never taught to" in reply["error"]["message"]
    assert ask(service, prompt=PROMPT)[0] == 200


class Broken:
    """A tokenizer that must not be asked to encode."""

    def __init__(self, tokenizer, message="tokenized"):
        self._tokenizer, self._message = tokenizer, message

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text, **_):
        raise RuntimeError(f"{self._message}: {text[:100]}")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": "fox " * 225_000}, "prompt"),
        ({"dialog": [{"role": "user", "content": "fox " * 225_000}]}, "dialog"),
        ({"dialog": [{"role": ("user", "assistant")[i % 2], "content": "x" * 99} for i in range(999)]}, "dialog"),
    ],
    ids=["prompt", "message", "many messages"],
)
def test_a_hopelessly_long_request_is_refused_without_being_tokenized(make_service, tokenizer, asked, param):
    service = make_service(words=Broken(tokenizer), chat=chat_format("llama2", Broken(tokenizer)))
    begin = time.thread_time()
    assert refusal(service, **asked) == (400, "context_length_exceeded", param)
    assert time.thread_time() - begin < 2


def test_a_text_with_more_characters_than_the_context_could_hold_is_not_tokenized(make_service, tokenizer):
    service = make_service(words=Broken(tokenizer))
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    assert refusal(service, prompt="x" * (longest * MAX_SEQ_LEN)) == (400, "context_length_exceeded", "prompt")
    assert ask(service, prompt="x" * (longest * MAX_SEQ_LEN - 1))[0] == 500  # it was tokenized


def test_the_longest_prompt_that_fits_is_not_hopeless(make_service, tokenizer):
    """Made of the vocabulary's longest token, as no real text is."""
    longest = max(range(3, tokenizer.vocab_size), key=lambda token: len(tokenizer.token_bytes(token)))
    text = tokenizer.token_bytes(longest).decode()
    service = make_service(max_seq_len=64)
    for count in range(50, 64):
        num_tokens = len(tokenizer.encode(text * count, bos=True))
        assert (ask(service, prompt=text * count)[0] == 200) == (num_tokens < 64)


def test_closing_a_request_cancels_it_and_frees_its_pages(make_service):
    service = make_service(max_seq_len=32_768)
    engine = service._loop.engine
    open_one(service, "one", prompt=PROMPT, stream=True, **{**SAMPLED, "max_new_tokens": 30_000})
    assert wait_until(lambda: service.poll(0.1))
    assert service.open_ids == {"one"}
    service.close("one")
    service.close("one")
    assert service.open_ids == set()
    assert wait_until(lambda: engine.num_requests == 0)
    assert wait_until(lambda: engine.scheduler.blocks.num_free == engine.config.num_pages)
    assert service.poll(0.01) == []
    assert ask(service, prompt=PROMPT)[0] == 200


def test_the_metrics_are_the_sums_of_what_clients_were_told(service):
    asked = [{"prompt": PROMPT}, {"prompt": PROMPT, "n": 3, "max_new_tokens": 5}, {"dialog": DIALOG, "stop": ["e"]}]
    usage = [ask(service, **one)[1]["usage"] for one in asked]
    refusal(service, prompt=PROMPT, temperature=-1)
    refusal(service, prompt=PROMPT, temperature=-2)
    go_on = pause_after(service, 3)
    open_one(service, "left", prompt=PROMPT, max_new_tokens=400, n=2, stream=True)
    assert wait_until(lambda: service.poll(0.1) and service.is_generating("left"))
    before = service.metrics.snapshot()
    service.close("left")
    go_on.set()
    stats = service.metrics.snapshot()
    prompts = [one["prompt_tokens"] for one in usage]
    assert stats.prompt_tokens == sum(prompts) + prompts[0]
    assert before.generation_tokens > sum(one["completion_tokens"] for one in usage)
    finished = {reason.value: count for reason, count in stats.finished.items() if count}
    assert finished["cancelled"] == 2
    assert finished.get("stop", 0) + finished["length"] == 1 + 3 + 1
    assert {key: count for key, count in stats.errors.items() if count} == {(400, "invalid_value"): 2}
    assert sum(stats.first_token_seconds.counts) == 4
    assert sum(stats.request_seconds.counts) == 3


def test_an_output_that_has_ended_is_not_cancelled_when_its_request_is(service):
    poison(service, 1)
    go_on = pause_after(service, 20)
    open_one(service, "left", prompt=[1, 2, 3], n=2, stream=True, **{**SAMPLED, "max_new_tokens": 400})
    assert wait_until(lambda: service.poll(0.01) and service.metrics.snapshot().finished[FinishReason.ERROR])
    service.close("left")
    go_on.set()
    finished = {reason: count for reason, count in service.metrics.snapshot().finished.items() if count}
    assert finished == {FinishReason.ERROR: 1, FinishReason.CANCELLED: 1}


def test_errors_that_the_engine_or_a_dialect_raises_are_counted(service, monkeypatch):
    monkeypatch.setattr(LlamaService, "_reply", lambda *_: 1 / 0)
    assert ask(service, prompt=PROMPT)[0] == 500
    monkeypatch.undo()
    monkeypatch.setattr(LlamaService, "_start", lambda *_: 1 / 0)
    assert ask(service, prompt=PROMPT)[0] == 500
    assert service.metrics.snapshot().errors[500, "internal_error"] == 2
    assert not any(service.metrics.snapshot().request_seconds.counts)


def test_a_request_that_is_closed_before_its_refusal_was_read_gets_none(service):
    service.open("one", b"not json")
    assert service.open_ids == {"one"}
    service.close("one")
    assert service.poll(0.01) == []


def test_polling_without_requests_returns_at_once(service):
    begin = time.monotonic()
    assert service.poll(PATIENCE_S) == []
    assert time.monotonic() - begin < PATIENCE_S / 2


def test_requests_at_once_get_what_they_get_alone(make_service):
    service = make_service(max_batch_size=3)
    bodies = {
        f"{kind} {i}": {"prompt": PROMPT[: 5 + i], "temperature": 0.9, "seed": i, "stream": kind == "stream"}
        for kind in ("whole", "stream")
        for i in range(4)
    }
    for request_id, body in bodies.items():
        open_one(service, request_id, **body)
    replies = collect(service, *bodies)
    for request_id, body in bodies.items():
        text = "".join(json.loads(reply.body)["text"] for reply in replies[request_id])
        assert text == ask(service, **{**body, "stream": False})[1]["text"]


def poison(service, *outputs):
    """Spoil the logits of these outputs of requests for [1, 2, 3], once each has three tokens."""
    engine = service._loop.engine
    execute = engine.runner.execute

    def execute_badly(plan):
        logits = execute(plan)
        victims = {
            sequence.row
            for sequence in engine.scheduler.running
            if sequence.request.prompt == (1, 2, 3) and sequence.index in outputs and sequence.num_generated >= 3
        }
        sampled = [chunk.row for chunk in plan.chunks if chunk.num_logits]
        if bad := [at for at, row in enumerate(sampled) if row in victims]:
            logits = logits.clone()
            logits[bad] = math.nan
        return logits

    engine.runner.execute = execute_badly


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_request_whose_logits_go_bad_ends_with_500_and_leaves_its_neighbour_alone(service, streaming):
    expected = ask(service, prompt=PROMPT, **SAMPLED)
    poison(service, 0)
    open_one(service, "good", prompt=PROMPT, **SAMPLED)
    open_one(service, "bad", prompt=[1, 2, 3], stream=streaming, **{**SAMPLED, "max_new_tokens": 400})
    replies = collect(service, "good", "bad")
    assert json.loads(replies["good"][0].body) == expected[1]
    error = json.loads(replies["bad"][-1].body)["error"]
    assert (error["code"], error["type"], error["param"]) == ("nan_logits", "server_error", None)
    if not streaming:
        assert replies["bad"][0].status == 500


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_an_output_whose_logits_go_bad_is_one_bad_choice_among_good_ones(service, streaming):
    body = {"prompt": [1, 2, 3], "n": 3, **SAMPLED}
    _, expected = ask(service, **body)
    poison(service, 1)
    if streaming:
        choices, usage = several(stream(service, **body))
    else:
        status, answer = ask(service, **body)
        assert status == 200
        choices, usage = answer["choices"], answer["usage"]
    assert [choices[i] for i in (0, 2)] == [expected["choices"][i] for i in (0, 2)]
    assert choices[1]["finish_reason"] == "error"
    assert (choices[1]["error"]["code"], choices[1]["error"]["type"]) == ("nan_logits", "server_error")
    assert expected["choices"][1]["text"].startswith(choices[1]["text"])
    assert usage["completion_tokens"] == 60 + 3 + 60


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_outputs_whose_logits_all_go_bad_are_a_failed_request(service, streaming):
    poison(service, 0, 1)
    open_one(service, "bad", prompt=[1, 2, 3], n=2, stream=streaming, **SAMPLED)
    last = collect(service, "bad")["bad"][-1]
    assert (last.status, json.loads(last.body)["error"]["code"]) == (500, "nan_logits")


def test_a_request_that_finds_the_queue_full_is_told_to_come_again(make_service):
    service = make_service(max_seq_len=32_768, max_batch_size=1, max_waiting=3)
    long = {"prompt": PROMPT, **SAMPLED, "max_new_tokens": 30_000}
    open_one(service, "running", **long)
    assert wait_until(lambda: service._loop.engine.scheduler.running)
    open_one(service, "waiting", n=3, **long)
    for body in ({}, {"n": 3}, {"stream": True}):
        open_one(service, "third", prompt=PROMPT, **body)
        (reply,) = collect(service, "third")["third"]
        error = json.loads(reply.body)["error"]
        assert (reply.status, error["code"], error["type"]) == (429, "queue_full", "invalid_request_error")
        assert "try again later" in error["message"]
    service.close("running")
    service.close("waiting")
    assert ask(service, prompt=PROMPT)[0] == 200


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_request_whose_time_is_up_keeps_what_it_has(clock, make_service, streaming, n):
    service = make_service(max_seq_len=32_768)
    runner = service._loop.engine.runner
    execute = runner.execute

    def execute_in_a_second(plan):
        clock.now += 1
        return execute(plan)

    runner.execute = execute_in_a_second
    body = {"prompt": PROMPT, "n": n, "timeout_s": 100, **SAMPLED, "max_new_tokens": 30_000}
    if streaming:
        choices, usage = several(stream(service, **body))
    else:
        status, answer = ask(service, **body)
        assert status == 200
        choices, usage = answer.get("choices", [answer]), answer["usage"]
    assert [choice["finish_reason"] for choice in choices] == ["timeout"] * n
    assert all(choice["text"] for choice in choices)
    assert 0 < usage["completion_tokens"] < 30_000 * n
    assert service._loop.engine.num_requests == 0


def test_a_timeout_that_is_not_reached_changes_nothing(service):
    assert ask(service, prompt=PROMPT, timeout_s=60, **SAMPLED) == ask(service, prompt=PROMPT, **SAMPLED)


def test_a_flood_of_bad_requests_does_not_silence_a_good_one(service):
    """Each poll found a refusal to return, and never got to ask the engine for tokens."""
    open_one(service, "good", prompt=PROMPT, stream=True, max_new_tokens=10)
    assert wait_until(lambda: len(service._loop._events) == 10)
    good = []
    for i in range(200):
        service.open(f"bad {i}", b"not json")
        good += [reply for reply in service.poll(0.02) if reply.request_id == "good"]
    assert good, "not a token in 200 polls"
    assert good[-1].is_last


def test_a_stream_that_is_far_behind_does_not_silence_the_others(make_service):
    service = make_service(max_seq_len=2048)
    open_one(service, "slow", prompt=PROMPT, stream=True, **{**SAMPLED, "max_new_tokens": 700})
    assert wait_until(lambda: len(service._loop._events) == 700)
    order = [reply.request_id for reply in service.poll(0)]
    open_one(service, "quick", prompt=PROMPT, max_new_tokens=2)
    assert wait_until(lambda: len(service._loop._events) == 2)
    while "quick" not in order:
        replies = service.poll(0.2)
        assert replies
        order += [reply.request_id for reply in replies]
    assert order.count("slow") < 700 / 64


def test_requests_that_nobody_asked_after_are_answered_with_503(clock, make_service):
    service = make_service(abandon_after_s=60, max_seq_len=32_768)
    open_one(service, "one", prompt=PROMPT, **{**SAMPLED, "max_new_tokens": 30_000})
    assert wait_until(lambda: service._loop.engine.num_requests == 1)
    clock.now += 61
    assert wait_until(lambda: service._loop.engine.num_requests == 0)
    (reply,) = collect(service, "one")["one"]
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (503, "cancelled")


def test_an_unforeseen_error_is_answered_with_500_and_harms_nobody(make_service, tokenizer):
    service = make_service(words=Broken(tokenizer))
    status, reply = ask(service, prompt="sesame")
    assert (status, reply["error"]["code"]) == (500, "internal_error")
    assert "sesame" not in reply["error"]["message"]
    assert ask(service, prompt=[1, 2])[0] == 200


def test_no_log_line_holds_what_a_user_sent(make_service, tokenizer, caplog):
    caplog.set_level(logging.DEBUG)
    service = make_service(max_seq_len=64)
    bodies = [
        {"prompt": "sesame"},
        {"prompt": "sesame " * 100},
        {"prompt": "sesame " * 100_000},
        {"prompt": "a", "stop": "sesame", "stream": True},
        {"prompt": "a", "sesame": 1},
        {"prompt": "a", "mode": "sesame"},
        {"prompt": ["sesame"]},
        {"dialog": [{"role": "sesame", "content": "a"}]},
        {"dialog": [{"role": "user", "content": "sesame [INST]"}]},
        {"dialog": [{"role": "user", "content": "sesame"}]},
    ]
    for i, body in enumerate(bodies):
        open_one(service, str(i), **body)
    service.open("text", b"sesame {")
    service.open("route", b"{}", "sesame")
    replies = collect(service, *(str(i) for i in range(len(bodies))), "text", "route")
    broken = make_service(words=Broken(tokenizer))
    ask(broken, prompt="sesame")
    assert sum(some[0].status != 200 for some in replies.values()) == 9
    assert len(re.findall(r"request \S+ \S+ [45]\d\d \w+$", caplog.text, re.MULTILINE)) == 9
    assert "request route unknown 404 unknown_route" in caplog.text
    assert re.search("parsing request .* failed: RuntimeError", caplog.text)
    assert "sesame" not in caplog.text


def test_the_assistant_s_last_message_is_continued_on_request_with_the_space_that_parts_it(service, tokenizer):
    """The oracle is a completion of the very ids that the format writes."""
    begun = [*DIALOG, {"role": "assistant", "content": "The quick"}]
    ids = tokenizer.encode("[INST] Where is the fox? [/INST] The quick", bos=True)
    _, completion = ask(service, prompt=ids, max_new_tokens=8)
    status, answer = ask(service, dialog=begun, continue_final_message=True, max_new_tokens=8)
    assert (status, answer["text"]) == (200, completion["text"])
    assert (
        "".join(c["text"] for c in stream(service, dialog=begun, continue_final_message=True, max_new_tokens=8))
        == (completion["text"])
    )
    assert refusal(service, dialog=begun) == (400, "invalid_role_order", "dialog[1].role")
    assert refusal(service, dialog=DIALOG, continue_final_message=True)[:2] == (400, "cannot_continue_message")


CHAT, COMPLETIONS = "v1/chat/completions", "v1/completions"
OPENAI = [(CHAT, {"messages": DIALOG}), (COMPLETIONS, {"prompt": PROMPT}), (COMPLETIONS, {"prompt": [1, 5, 9]})]


def sse(service, route, **body):
    """The data of a stream's events, [DONE] excluded, and the last reply."""
    request_id = f"streamed {next(_counter)}"
    open_one(service, request_id, route, stream=True, **body)
    replies = collect(service, request_id)[request_id]
    assert {reply.content_type for reply in replies[:-1]} <= {"text/event-stream"}
    *events, done, rest = b"".join(reply.body for reply in replies).split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events], replies[-1]


def without_details(usage):
    """What was cached depends on earlier requests."""
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


def text_of(choice):
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"]


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stop": ["e", "zz"]}, {"min_tokens": 20, "stop": "e"}], ids=str)
@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize(("route", "asked"), OPENAI)
def test_an_openai_stream_joined_is_the_answer_in_one_piece(service, route, asked, seed, extra):
    body = {**asked, "temperature": 1.0, "top_k": 30, "seed": seed, "max_tokens": 60, **extra}
    status, answer = ask(service, route, **body)
    chunks, _ = sse(service, route, **body, stream_options={"include_usage": True})
    assert status == 200
    texts, reasons = {}, {}
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + text_of(choice)
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {choice["index"]: text_of(choice) for choice in answer["choices"]}
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in answer["choices"]}
    assert without_details(chunks[-1]["usage"]) == without_details(answer["usage"])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_openai_s_routes_give_the_native_route_s_text(service, streaming):
    """Which is checked against the tokenizer and the engine."""
    native = {"temperature": 1.0, "seed": 7, "max_new_tokens": 20, "logprobs": True, "top_logprobs": 2}
    openai = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    _, expected = ask(service, prompt=PROMPT, **native)
    _, answer = ask(service, COMPLETIONS, prompt=PROMPT, **openai, logprobs=2)
    (choice,) = answer["choices"]
    assert (choice["text"], without_details(answer["usage"])) == (expected["text"], expected["usage"])
    logprobs = [one["logprob"] for one in expected["logprobs"]]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
    _, expected = ask(service, dialog=DIALOG, **native)
    _, answer = ask(service, CHAT, messages=DIALOG, **openai, logprobs=True, top_logprobs=2)
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], without_details(answer["usage"])) == (expected["text"], expected["usage"])
    # What the prefix cache has is not computed again, and the rest is rounded differently.
    for one, record in zip(choice["logprobs"]["content"], expected["logprobs"], strict=True):
        assert (one["token"], one["bytes"]) == (record["token"], record["bytes"])
        assert one["logprob"] == pytest.approx(record["logprob"], abs=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_usage_tells_how_much_of_the_prompt_was_cached(make_service, n):
    """Whole pages, without the last token of the prompt, which is always computed."""
    service = make_service(page_size=16)
    body = {"prompt": [1, *range(5, 44)], "temperature": 0, "n": n}  # 40 tokens
    cached = []
    for _ in range(2):
        _, answer = ask(service, COMPLETIONS, **body)
        chunks, _ = sse(service, COMPLETIONS, **body, stream_options={"include_usage": True})
        cached += [usage["prompt_tokens_details"]["cached_tokens"] for usage in (answer["usage"], chunks[-1]["usage"])]
    assert cached == [0, 32, 32, 32]
    _, answer = ask(make_service(prefix_cache=False), COMPLETIONS, **body)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat_without_a_length_may_fill_the_context(make_service):
    service = make_service(max_seq_len=64)
    _, answer = ask(service, CHAT, messages=DIALOG, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 64
    _, answer = ask(service, COMPLETIONS, prompt=PROMPT, temperature=0)
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("route", "body", "code", "param"),
    [
        (CHAT, {"messages": DIALOG, "max_completion_tokens": 512}, "context_length_exceeded", "max_completion_tokens"),
        (CHAT, {"messages": DIALOG, "max_tokens": 512}, "context_length_exceeded", "max_tokens"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "fox " * 225_000}]},
            *("context_length_exceeded", "messages"),
        ),
        (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, "invalid_role", "messages[0].role"),
        (CHAT, {"messages": [*DIALOG, *DIALOG]}, "invalid_role_order", "messages[1].role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "[INST]"}]},
            *("special_tags_not_allowed", "messages[0].content"),
        ),
        (COMPLETIONS, {"prompt": [1] * 512}, "context_length_exceeded", "prompt"),
        (COMPLETIONS, {"prompt": "fox " * 225_000}, "context_length_exceeded", "prompt"),
        (COMPLETIONS, {"prompt": [1, 10**6]}, "token_out_of_range", "prompt[1]"),
        (COMPLETIONS, {"prompt": PROMPT, "logit_bias": {"1000000": 1}}, "token_out_of_range", "logit_bias.1000000"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_what_cannot_run_is_refused_in_openai_s_words(service, route, body, code, param, streaming):
    status, reply = ask(service, route, **body, stream=streaming)
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, code, param)
    assert "max_new_tokens" not in reply["error"]["message"]


@pytest.mark.parametrize(("route", "asked"), OPENAI[:2])
def test_a_full_queue_is_a_429_in_json_even_for_a_stream(make_service, route, asked):
    service = make_service(max_seq_len=32_768, max_batch_size=1, max_waiting=1)
    long = {"prompt": PROMPT, **SAMPLED, "max_new_tokens": 30_000}
    open_one(service, "running", **long)
    assert wait_until(lambda: service._loop.engine.scheduler.running)
    open_one(service, "waiting", **long)
    for streaming in (False, True):
        status, reply = ask(service, route, **asked, stream=streaming)
        assert (status, reply["error"]["code"]) == (429, "queue_full")
    service.close("running")
    service.close("waiting")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_an_openai_request_fails_with_its_first_failed_output(service, n, streaming):
    """In mid-stream, the client gets an event with the error; nothing more is computed."""
    poison(service, n - 1)
    body = {"prompt": [1, 2, 3], "n": n, "temperature": 1.0, "top_k": 30, "seed": 7, "max_tokens": 400}
    open_one(service, "bad", COMPLETIONS, **body, stream=streaming)
    *others, last = collect(service, "bad")["bad"]
    data, *done = last.body.removesuffix(b"\n\n").split(b"\n\n")
    assert done == ([b"data: [DONE]"] if others else [])  # all of it may have happened before the first reply
    error = json.loads(data.removeprefix(b"data: ") if others else data)["error"]
    assert (last.status, error["code"], error["type"]) == (500, "nan_logits", "server_error")
    assert service.open_ids == set()
    assert wait_until(lambda: service._loop.engine.num_requests == 0)


@pytest.mark.parametrize("body", [b"", b"{}", {}])
def test_the_model_is_described_whatever_the_method(service, body):
    service.open("list", body, "v1/models")
    service.open("one", body, "v1/models/llama")
    service.open("other", body, "v1/models/gpt-4o")
    assert service.open_ids == {"list", "one", "other"}
    replies = {reply.request_id: reply for reply in service.poll(0)}
    assert json.loads(replies["list"].body)["data"] == [json.loads(replies["one"].body)]
    assert json.loads(replies["one"].body)["max_model_len"] == MAX_SEQ_LEN
    assert [replies[one].status for one in ("list", "one", "other")] == [200, 200, 404]


def scores_by_engine(model, ids):
    """Checked against transformers in test_prompt_logprobs.py."""
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=2)
    (done,) = engine_of(model, max_seq_len=MAX_SEQ_LEN).generate([ids], params)
    return [None, *(pytest.approx(one.chosen, abs=1e-4) for one in done.prompt_logprobs)]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("prompt", [PROMPT, [1, 5, 9, 40, 41]])
def test_an_echoed_prompt_is_scored_in_one_piece_and_in_a_stream(service, model, tokenizer, prompt, max_tokens):
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0, "n": 2}
    status, answer = ask(service, COMPLETIONS, **body)
    ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    for choice in answer["choices"]:
        assert choice["text"].startswith(tokenizer.decode(ids))
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"][: len(ids)] == scores_by_engine(model, ids)
        assert {len(values) for values in choice["logprobs"].values()} == {len(ids) + max_tokens}
        starts = [*choice["logprobs"]["text_offset"][1:], len(choice["text"])]
        assert starts == sorted(starts)
    chunks, _ = sse(service, COMPLETIONS, **body)
    for choice in answer["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            if name == "text_offset" or name == "tokens":
                assert streamed == values


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, ""])
def test_a_prompt_is_scored_in_every_dialect(service, model, tokenizer, route):
    asked = {"messages": DIALOG} if route == CHAT else {"prompt": PROMPT}
    length = {"max_tokens": 0} if route else {"max_new_tokens": 0}
    status, answer = ask(service, route, **asked, **length, prompt_logprobs=1)
    ids = tokenizer.encode("[INST] Where is the fox? [/INST]" if route == CHAT else PROMPT, bos=True)
    assert (status, answer["usage"]["prompt_tokens"]) == (200, len(ids))
    holder = answer["choices"][0] if route == COMPLETIONS else answer
    records = holder["prompt_logprobs"]
    if route:
        values = [one and one[str(token)]["logprob"] for one, token in zip(records, ids, strict=True)]
    else:
        values = [one["logprob"] for one in records]
    assert values == scores_by_engine(model, ids)
    assert service.metrics.snapshot().prompt_tokens == len(ids)


def test_a_prompt_that_fills_the_context_can_be_scored(make_service):
    service = make_service(max_seq_len=64)
    body = {"prompt": [1, *range(5, 68)], "echo": True, "logprobs": 0}
    status, answer = ask(service, COMPLETIONS, **body, max_tokens=0)
    assert (status, len(answer["choices"][0]["logprobs"]["tokens"])) == (200, 64)
    status, answer = ask(service, COMPLETIONS, **body, max_tokens=1)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = ask(service, COMPLETIONS, **{**body, "prompt": [1, *range(5, 69)]}, max_tokens=0)
    assert (status, answer["error"]["message"]) == (
        400,
        "prompt has 65 tokens, but the context of 64 tokens must hold it; send at most 64",
    )


def test_more_scores_than_an_answer_holds_are_refused(service):
    body = {"prompt": [[5] * 400] * 4, "echo": True, "logprobs": 20, "max_tokens": 0}
    for streaming in (False, True):
        status, answer = ask(service, COMPLETIONS, **body, stream=streaming)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "answer_too_large", "logprobs")
    assert ask(service, COMPLETIONS, **{**body, "logprobs": 5})[0] == 200


SEVERAL = [PROMPT, [1, 5, 9], "A"]


@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts_get_what_they_get_alone(service, n):
    body = {"temperature": 1.0, "seed": 7, "max_tokens": 20, "n": n, "echo": True}
    alone = [ask(service, COMPLETIONS, prompt=prompt, **body)[1] for prompt in SEVERAL]
    status, answer = ask(service, COMPLETIONS, prompt=SEVERAL, **body)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(3 * n))
    assert [choice["text"] for choice in answer["choices"]] == [
        choice["text"] for one in alone for choice in one["choices"]
    ]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer["usage"][name] == sum(one["usage"][name] for one in alone)
    chunks, _ = sse(service, COMPLETIONS, prompt=SEVERAL, **body, stream_options={"include_usage": True})
    texts = [""] * (3 * n)
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]
    assert without_details(chunks[-1]["usage"]) == without_details(answer["usage"])


def test_several_prompts_wait_together_or_not_at_all(make_service):
    service = make_service(max_seq_len=32_768, max_batch_size=1, max_waiting=3)
    open_one(service, "running", prompt=PROMPT, **{**SAMPLED, "max_new_tokens": 30_000})
    assert wait_until(lambda: service._loop.engine.scheduler.running)
    open_one(service, "waiting", prompt=PROMPT, **{**SAMPLED, "max_new_tokens": 5})
    status, answer = ask(service, COMPLETIONS, prompt=SEVERAL)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert service._loop.engine.num_requests == 2, "some of them are waiting"
    status, answer = ask(service, COMPLETIONS, prompt=SEVERAL, n=2)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_value", "prompt")
    service.close("running")
    collect(service, "waiting")
    assert ask(service, COMPLETIONS, prompt=SEVERAL)[0] == 200


@pytest.mark.parametrize(
    ("prompt", "code", "param"),
    [
        (["a", [1, 10**6]], "token_out_of_range", "prompt[1][1]"),
        (["a", [1] * 512], "context_length_exceeded", "prompt[1]"),
        (["a", "fox " * 225_000], "context_length_exceeded", "prompt[1]"),
    ],
)
def test_one_prompt_that_cannot_run_refuses_them_all(service, prompt, code, param):
    status, answer = ask(service, COMPLETIONS, prompt=prompt)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param)
    assert service._loop.engine.num_requests == 0


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_one_prompt_that_fails_ends_them_all(service, streaming):
    poison(service, 0)
    body = {"prompt": [[1, 5, 9], [1, 2, 3], [4]], "temperature": 1.0, "top_k": 30, "seed": 7, "max_tokens": 400}
    open_one(service, "bad", COMPLETIONS, **body, stream=streaming)
    *_, last = collect(service, "bad")["bad"]
    assert b"nan_logits" in last.body
    assert last.status == 500
    assert wait_until(lambda: service._loop.engine.num_requests == 0)


def test_closing_a_request_of_several_prompts_cancels_them_all(make_service):
    service = make_service(max_seq_len=32_768, max_batch_size=2)
    open_one(service, "left", COMPLETIONS, prompt=SEVERAL, max_tokens=30_000, temperature=0, stream=True)
    assert wait_until(lambda: service.poll(0.01) and service.is_generating("left"))
    service.close("left")
    assert wait_until(lambda: service._loop.engine.num_requests == 0)
    assert service.metrics.snapshot().finished[FinishReason.CANCELLED] == 3


def test_a_message_of_a_stream_has_parts_of_a_limited_number_of_outputs(make_service, monkeypatch):
    monkeypatch.setattr(reply_size, "MAX_CHUNK_OUTPUTS", 2)
    service = make_service()
    body = {"prompt": [[1, 5, 9]] * 5, "temperature": 1.0, "seed": 7, "max_tokens": 30}
    _, answer = ask(service, COMPLETIONS, **body)
    open_one(service, "many", COMPLETIONS, **body, stream=True)
    texts = [""] * 5
    for reply in collect(service, "many")["many"]:
        events = [event.removeprefix(b"data: ") for event in reply.body.split(b"\n\n")[:-1]]
        choices = [choice for event in events if event != b"[DONE]" for choice in json.loads(event)["choices"]]
        assert len({choice["index"] for choice in choices}) <= 2
        for choice in choices:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_stop_string_is_part_of_the_text_on_request(service, streaming):
    body = {"prompt": PROMPT, "temperature": 1.0, "seed": 7, "max_tokens": 60, "stop": "e"}

    def text(**fields):
        if streaming:
            return "".join(chunk["choices"][0]["text"] for chunk in sse(service, COMPLETIONS, **body, **fields)[0])
        return ask(service, COMPLETIONS, **body, **fields)[1]["choices"][0]["text"]

    assert text(include_stop_str_in_output=True) == text() + "e"


def test_a_stop_token_s_text_is_part_of_the_text_on_request(service, tokenizer):
    (word,) = tokenizer.encode("the")
    body = {"prompt": PROMPT, "logit_bias": {str(word): 100}, "stop_token_ids": [word], "max_tokens": 3}
    assert text_of(ask(service, COMPLETIONS, **body)[1]["choices"][0]) == ""
    _, answer = ask(service, COMPLETIONS, **body, include_stop_str_in_output=True)
    assert (text_of(answer["choices"][0]), answer["choices"][0]["finish_reason"]) == (" the", "stop")
    end = {"logit_bias": {str(tokenizer.eos_id): 100}, "include_stop_str_in_output": True, "skip_special_tokens": False}
    assert text_of(ask(service, COMPLETIONS, prompt=PROMPT, **end)[1]["choices"][0]) == "</s>"


def test_special_tokens_are_text_on_request(service, tokenizer):
    body = {"prompt": PROMPT, "logit_bias": {str(tokenizer.bos_id): 100}, "max_tokens": 2}
    assert text_of(ask(service, COMPLETIONS, **body)[1]["choices"][0]) == ""
    assert text_of(ask(service, COMPLETIONS, **body, skip_special_tokens=False)[1]["choices"][0]) == "<s><s>"
    chunks, _ = sse(service, COMPLETIONS, **body, skip_special_tokens=False)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "<s><s>"


def test_only_allowed_tokens_are_sampled(service):
    _, answer = ask(
        *(service, COMPLETIONS),
        prompt=PROMPT,
        temperature=2.0,
        max_tokens=60,
        allowed_token_ids=[40, 41, 50],
        return_token_ids=True,
    )
    assert set(answer["choices"][0]["token_ids"]) == {40, 41, 50}
    status, answer = ask(service, COMPLETIONS, prompt=PROMPT, allowed_token_ids=[40, 10**6])
    assert (status, answer["error"]["param"]) == (400, "allowed_token_ids[1]")


@pytest.mark.parametrize("prompt", ["The quick brown fox jumps", [1, 5, 9, 40, 41]])
def test_a_truncated_prompt_is_its_end(service, tokenizer, prompt):
    ids = (tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt)[-3:]
    body = {"temperature": 0, "max_tokens": 5, "echo": True}
    _, answer = ask(service, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=3, return_token_ids=True, **body)
    _, expected = ask(service, COMPLETIONS, prompt=ids, **body)
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert answer["choices"][0]["prompt_token_ids"] == ids
    assert answer["usage"]["prompt_tokens"] == 3
    assert ask(service, COMPLETIONS, prompt="fox " * 225_000, truncate_prompt_tokens=3)[0] == 200
    _, answer = ask(service, CHAT, messages=DIALOG, truncate_prompt_tokens=3, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 3


def test_a_prompt_may_be_read_without_a_beginning_of_its_own(service, tokenizer):
    """As by vLLM: BOS is in a text that another program has rendered."""
    body = {"prompt": PROMPT, "max_tokens": 1, "return_token_ids": True}
    for adds, bos in ((True, True), (False, False)):
        _, answer = ask(service, COMPLETIONS, **body, add_special_tokens=adds)
        assert answer["choices"][0]["prompt_token_ids"] == tokenizer.encode(PROMPT, bos=bos)


def test_a_dialog_may_be_sent_without_a_place_for_an_answer(service, tokenizer):
    messages = [*DIALOG, {"role": "assistant", "content": "In the sea"}]
    body = {"messages": messages, "add_generation_prompt": False, "max_tokens": 0, "prompt_logprobs": 0}
    _, answer = ask(service, CHAT, **body, return_token_ids=True)
    whole = tokenizer.encode("[INST] Where is the fox? [/INST] In the sea ", bos=True, eos=True)
    assert answer["prompt_token_ids"] == whole
    assert len(answer["prompt_logprobs"]) == len(whole)


@pytest.mark.parametrize("path", [CHAT, "tokenize"])
def test_variables_without_a_template_are_refused(service, path):
    """As tools that the model cannot call, in a message that named the dialog."""
    status, answer = ask(service, path, messages=DIALOG, chat_template_kwargs={"enable_thinking": True})
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (
        400,
        "template_variables_not_supported",
        "chat_template_kwargs",
    )
    assert "chat template" in error["message"]
    assert "tools" not in error["message"]
    assert ask(service, path, messages=DIALOG, chat_template_kwargs={})[0] == 200


def test_bad_words_are_not_in_the_answer(service, tokenizer):
    (word,) = tokenizer.encode("the")
    body = {"prompt": PROMPT, "logit_bias": {str(word): 100}, "max_tokens": 20, "return_token_ids": True}
    assert set(ask(service, COMPLETIONS, **body)[1]["choices"][0]["token_ids"]) == {word}
    assert word not in ask(service, COMPLETIONS, **body, bad_words=["the"])[1]["choices"][0]["token_ids"]
    pairs = ask(service, COMPLETIONS, **body, bad_words=["the the"])[1]["choices"][0]["token_ids"]
    assert word in pairs
    assert (word, word) not in set(itertools.pairwise(pairs))


def test_the_chat_page_is_answered_as_html(service):
    service.open("page", b"", "chat")
    (reply,) = service.poll(0)
    assert (reply.status, reply.is_last, reply.content_type) == (200, True, "text/html; charset=utf-8")
    assert reply.body.startswith(b"<!doctype html>")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")


def lines_of(caplog):
    """The request log, without ids and times."""
    pattern = r"request (?:asked )?\S+ (.*?)(, TTFT .*)?"
    messages = [one.getMessage() for one in caplog.records if one.name == "llama_tp.serving.request_log"]
    return [re.fullmatch(pattern, message)[1] for message in messages]


def test_every_request_is_logged_once_with_how_it_ended(make_service, caplog):
    caplog.set_level(logging.INFO)
    service = make_service()
    ask(service, "v1/completions", prompt=PROMPT, max_tokens=5, temperature=0)
    go_on = pause_after(service, 3)
    open_one(service, "gone", prompt=PROMPT, max_new_tokens=400)
    assert wait_until(lambda: not service.poll(0.05) and service.is_generating("gone"))
    service.close("gone")
    service.close("gone")
    go_on.set()
    service.open("models", b"", "v1/models")
    service.open("secret", b"{}", "secret/route")
    collect(service, "models", "secret")
    ask(service, prompt=PROMPT, max_new_tokens=0)
    lines = lines_of(caplog)
    assert re.fullmatch(r"v1/completions 200 length: \d+ tokens in, 5 out", lines[0])
    assert re.fullmatch(r"predictions 499 cancelled: \d+ tokens in, \d+ out", lines[1])
    assert lines[2:] == ["v1/models 200 ok", "unknown 404 unknown_route", "predictions 400 invalid_value"]


def test_while_it_drains_open_requests_go_on_and_new_ones_are_refused(service):
    assert service.is_idle
    go_on = pause_after(service, 3)
    open_one(service, "a", prompt=PROMPT, max_new_tokens=40)
    service.drain()
    assert not service.is_idle
    status, error = ask(service, "v1/completions", prompt=PROMPT)
    assert (status, error["error"]["code"], error["error"]["type"]) == (503, "shutting_down", "server_error")
    assert ask(service, "v1/models")[0] == 503
    go_on.set()
    (reply,) = collect(service, "a")["a"]
    assert json.loads(reply.body)["usage"]["completion_tokens"] == 40
    assert service.is_idle


def test_with_a_key_every_route_but_the_page_needs_it(make_service):
    service = make_service(access=Access("k"))
    for route in ("", "v1/completions", "v1/models", "no/such"):
        status, error = ask(service, route, prompt=PROMPT)
        assert (status, error["error"]["code"]) == (401, "invalid_api_key")
    service.open("page", b"", "chat")
    service.open("with", json.dumps({"prompt": PROMPT}).encode(), credentials="k")
    replies = collect(service, "page", "with")
    assert [replies[one][0].status for one in ("page", "with")] == [200, 200]


def test_a_model_answers_to_the_name_in_its_url_too_and_says_the_one_it_is_served_under(make_service):
    service = make_service(served_name="org/Model-7B")
    for name in ("org/Model-7B", "llama", None):
        status, answer = ask(service, "v1/completions", prompt=PROMPT, **({"model": name} if name else {}))
        assert (status, answer["model"]) == (200, "org/Model-7B")
    assert ask(service, "v1/completions", prompt=PROMPT, model="other")[0] == 404
    (listed,) = ask(service, "v1/models")[1]["data"]
    assert listed["id"] == "org/Model-7B"
    assert ask(service, "v1/models/llama")[1] == ask(service, "v1/models/org/Model-7B")[1] == listed
