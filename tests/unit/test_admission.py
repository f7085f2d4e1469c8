"""Admission: what a model or a server's limits rule out is refused, once, in the words of the request's dialect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.admission import (
    MAX_LOGPROBS,
    Admission,
    Limits,
    check_vocabulary,
    fit_answer,
    fit_context,
)
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import FieldNames, GenerationRequest
from llama_tp.text import load_tokenizer
from llama_tp.text.dialog import Message
from tests.unit.text_fixtures import file_of, tiny

HI = (Message("user", "Hi"),)
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}


def request_for(max_new_tokens: int, explicit: bool, **fields: Any) -> GenerationRequest:
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING}
    others = {name: value for name, value in fields.items() if name not in _SAMPLING}
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    if "dialog" not in others and "prompts" not in others:
        prompt = others.pop("prompt", "x")
        others.setdefault("prompts", (prompt,))
    return GenerationRequest(**others, sampling=params, max_new_tokens_explicit=explicit)


@pytest.mark.parametrize(
    ("prompt", "wanted", "explicit", "granted"),
    [
        (1, 50, True, 50),
        (50, 50, True, 50),
        (99, 1, True, 1),
        (1, 50, False, 50),
        (60, 50, False, 40),
        (99, 50, False, 1),
        (99, 2**24, False, 1),
    ],
)
def test_what_fits_into_the_context_is_granted(prompt: int, wanted: int, explicit: bool, granted: int) -> None:
    assert fit_context(request_for(wanted, explicit), prompt, 100) == granted


@pytest.mark.parametrize(
    ("prompt", "wanted", "explicit", "param", "numbers"),
    [
        (100, 1, False, "dialog", ["100"]),
        (100, 1, True, "dialog", ["100"]),
        (12345, 1, False, "dialog", ["12345", "100"]),
        (51, 50, True, "max_new_tokens", ["51", "50", "100", "at most 49"]),
        (99, 2, True, "max_new_tokens", ["99", "2", "100", "at most 1"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    prompt: int, wanted: int, explicit: bool, param: str, numbers: list[str]
) -> None:
    with pytest.raises(ApiError) as caught:
        fit_context(request_for(wanted, explicit, dialog=HI), prompt, 100)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "context_length_exceeded", param)
    assert all(number in caught.value.message for number in numbers)


def test_a_default_is_clipped_to_no_less_than_min_new_tokens() -> None:
    assert fit_context(request_for(50, False, min_new_tokens=40), 60, 100) == 40
    with pytest.raises(ApiError) as caught:
        fit_context(request_for(50, False, min_new_tokens=41), 60, 100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "min_new_tokens")
    assert caught.value.message.startswith("min_new_tokens=41 does not fit")


def test_a_refusal_speaks_the_dialect_of_the_request() -> None:
    names = FieldNames(dialog="messages", max_new_tokens="max_tokens")
    request = request_for(50, True, dialog=HI, names=names)
    with pytest.raises(ApiError) as caught:
        fit_context(request, 51, 100)
    assert caught.value.param == "max_tokens"
    assert caught.value.message.startswith("max_tokens=50 does not fit: messages takes 51 of the context's")


@pytest.mark.parametrize("ids", [(), (0,), (0, 31999), [5]])
def test_ids_of_the_vocabulary_pass(ids: tuple[int, ...]) -> None:
    check_vocabulary(request_for(1, True, prompt=tuple(ids)), 32000)


@pytest.mark.parametrize(("ids", "at"), [((32000,), 0), ((1, 2**70), 1), ((0, 1, -1), 2)])
def test_an_id_outside_the_vocabulary_is_refused_and_named(ids: tuple[int, ...], at: int) -> None:
    with pytest.raises(ApiError) as caught:
        check_vocabulary(request_for(1, True, prompt=ids), 32000)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "token_out_of_range", f"prompt[{at}]")
    assert "31999" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": (1, 32000)}, "prompt[1]"),
        ({"stop_token_ids": (0, 31999, 32000)}, "stop_token_ids[2]"),
        ({"logit_bias": {0: 1.0, 32000: 1.0}}, "logit_bias.32000"),
    ],
)
def test_an_id_anywhere_outside_the_vocabulary_is_refused(fields: dict[str, Any], param: str) -> None:
    request = request_for(1, True, **fields)
    with pytest.raises(ApiError) as caught:
        check_vocabulary(request, 32000)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "token_out_of_range", param)
    assert "0 to 31999" in caught.value.message
    check_vocabulary(request, 32001)


def test_an_answer_in_one_piece_holds_a_limited_number_of_logprobs() -> None:
    fields: dict[str, Any] = {"logprobs": 15, "n": 2}
    most = MAX_LOGPROBS // (2 * 16)
    assert fit_answer(request_for(most, True, **fields), most) == most
    assert fit_answer(request_for(most, True, **fields, stream=True), most + 1) == most + 1
    assert fit_answer(request_for(most, True, n=16), 2**24) == 2**24
    with pytest.raises(ApiError) as caught:
        fit_answer(request_for(most, True, **fields), most + 1)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "answer_too_large", "logprobs")
    assert all(number in caught.value.message for number in ("n=2", str(most + 1), "top_logprobs=15", "stream"))


def test_a_default_is_clipped_to_the_logprobs_that_an_answer_holds_but_to_no_less_than_min_new_tokens() -> None:
    fields: dict[str, Any] = {"logprobs": 15, "n": 2}
    most = MAX_LOGPROBS // (2 * 16)
    assert fit_answer(request_for(2**24, False, **fields), 2**24) == most
    assert fit_answer(request_for(2**24, False, **fields, min_new_tokens=most), 2**24) == most
    with pytest.raises(ApiError):
        fit_answer(request_for(2**24, False, **fields, min_new_tokens=most + 1), 2**24)


@pytest.fixture(scope="module")
def admission() -> Admission:
    tokenizer = tiny("sentencepiece")
    limits = Limits(vocab_size=tokenizer.vocab_size, max_seq_len=100, max_waiting=8)
    return Admission(tokenizer, "it was never taught to", limits, longest_token=16)


def test_an_admitted_request_keeps_its_sampling_but_for_what_admission_decides(admission: Admission) -> None:
    request = request_for(500, False, prompt=(1, 2, 3), temperature=0.5, seed=3, logit_bias={9: 1.5}, logprobs=4)
    (admitted,) = admission.admit(request)
    stop_ids = tiny("sentencepiece").stop_ids
    assert admitted.prompt == [1, 2, 3]
    assert admitted.params == request.sampling.but(max_new_tokens=97, stop_ids=stop_ids)


@pytest.mark.parametrize(("prompts", "param"), [(("\x04",), "prompt"), (("fox", "\x04\x04"), "prompt[1]")])
def test_a_prompt_without_any_character_of_the_vocabulary_is_refused(
    tmp_path: Path, prompts: tuple[str, ...], param: str
) -> None:
    """As SmolLM2's vocabulary, which lacks some control characters. It reached the engine, and ended in a 500."""
    definition = json.loads(file_of("tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab["unused"] = vocab.pop("Ą")  # byte 4
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("\x04fox") == tokenizer.encode("fox")
    limits = Limits(vocab_size=tokenizer.vocab_size, max_seq_len=100, max_waiting=8)
    admission = Admission(tokenizer, "it has none", limits, longest_token=16)
    assert len(admission.admit(request_for(1, True, prompts=("fox", "\x04fox")))) == 2
    with pytest.raises(ApiError) as caught:
        admission.admit(request_for(1, True, prompts=prompts))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "empty_prompt", param)
    assert caught.value.message.startswith(f"{param} has no tokens")


@pytest.mark.parametrize(
    ("fields", "stop_ids"),
    [
        ({}, {2}),
        ({"stop_token_ids": (7, 8, 7)}, {2, 7, 8}),
        ({"ignore_eos": True}, set()),
        ({"ignore_eos": True, "stop_token_ids": (2, 7)}, {2, 7}),
    ],
)
def test_what_ends_an_answer_is_the_format_s_and_the_request_s_to_say(
    admission: Admission, fields: dict[str, Any], stop_ids: set[int]
) -> None:
    (admitted,) = admission.admit(request_for(1, True, prompt=(1,), **fields))
    assert admitted.params.stop_ids == stop_ids


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 9}, "invalid_value", "n"),
        ({"dialog": HI}, "chat_not_supported", "dialog"),
        ({"prompt": "x" * 1600}, "context_length_exceeded", "prompt"),
        ({"prompt": (10**6,)}, "token_out_of_range", "prompt[0]"),
    ],
)
def test_admission_makes_every_check(admission: Admission, fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        admission.admit(request_for(1, True, **fields))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
