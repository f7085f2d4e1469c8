"""tokenize, detokenize and count_tokens: behind the real admission, chat formats and tokenizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.admission import Admission, Limits
from llama_tp.serving.dialects.anthropic.routes import anthropic_queries
from llama_tp.serving.dialects.openai.routes import openai_queries
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.reply_size import MAX_ANSWER_BYTES
from llama_tp.text.chat import chat_format
from llama_tp.text.dialog import Message
from tests.unit.text_fixtures import KINDS, texts, tiny, tokenizer_with_template

DEFAULTS = RequestDefaults(
    mode="chat", max_new_tokens=100, seed=None, sampling={knob.name: knob.default for knob in KNOBS}
)
QUERIES = openai_queries(DEFAULTS, ("llama",)) | anthropic_queries(DEFAULTS, ("llama",))
TOKENIZE, DETOKENIZE, COUNT = "tokenize", "detokenize", "v1/messages/count_tokens"
MAX_SEQ_LEN = 64
HI = [{"role": "user", "content": "Where is the fox?"}]


def admission(kind: str = "sentencepiece", max_seq_len: int = MAX_SEQ_LEN) -> Admission:
    tokenizer = tiny(kind)
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    limits = Limits(tokenizer.vocab_size, max_seq_len, 8)
    chat = chat_format("llama2", tokenizer) if kind == "sentencepiece" else "it has none"
    return Admission(tokenizer, chat, limits, longest_token=longest)


def ask(route: str, kind: str = "sentencepiece", /, *, max_seq_len: int = MAX_SEQ_LEN, **body: Any) -> Any:
    return json.loads(QUERIES[route].answer(json.dumps(body).encode(), admission(kind, max_seq_len)))


def refusal(route: str, /, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(route, **body)
    assert json.loads(QUERIES[route].error(caught.value))
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_tokens_that_are_generated_from(kind: str) -> None:
    tokenizer = tiny(kind)
    plain = tokenizer.encode("The fox é")
    whole = tokenizer.encode("The fox é", bos=tokenizer.adds_bos)
    answer = ask(TOKENIZE, kind, prompt="The fox é")
    assert answer == {"count": len(whole), "max_model_len": MAX_SEQ_LEN, "tokens": whole, "token_strs": None}
    assert ask(TOKENIZE, kind, prompt="The fox é", add_special_tokens=True) == answer
    assert ask(TOKENIZE, kind, prompt="The fox é", add_special_tokens=False)["tokens"] == plain
    assert ask(TOKENIZE, kind, prompt="")["count"] == len(whole) - len(plain)


def test_a_chat_has_the_tokens_of_its_prompt() -> None:
    tokenizer = tiny("sentencepiece")
    expected = chat_format("llama2", tokenizer).encode([Message("user", "Where is the fox?")])
    assert ask(TOKENIZE, messages=HI, model="llama", add_generation_prompt=True)["tokens"] == expected
    assert ask(COUNT, messages=HI) == {"input_tokens": len(expected)}
    with_system = chat_format("llama2", tokenizer).encode([Message("system", "Be brief."), Message("user", "Hi")])
    counted = ask(COUNT, messages=[{"role": "user", "content": "Hi"}], system="Be brief.", max_seq_len=512)
    assert counted == {"input_tokens": len(with_system)}
    begun = [*HI, {"role": "assistant", "content": "The"}]
    continued = ask(TOKENIZE, messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert continued["tokens"][: len(expected)] == expected
    assert continued["count"] == ask(COUNT, messages=begun)["input_tokens"] > len(expected)


def test_a_chat_is_counted_with_the_variables_of_its_template() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinks %} and think{% endif %}"
    tokenizer = tokenizer_with_template(template, "tokenizer.json")
    reader = Admission(tokenizer, chat_format("jinja", tokenizer), Limits(512, MAX_SEQ_LEN, 8), longest_token=64)

    def tokens(**fields: Any) -> list[int]:
        body = json.dumps({"messages": HI, **fields}).encode()
        return json.loads(QUERIES[TOKENIZE].answer(body, reader))["tokens"]

    assert tokens() == tokenizer.encode("Where is the fox?")
    assert tokens(chat_template_kwargs={"thinks": True}) == tokenizer.encode("Where is the fox? and think")


def test_the_texts_of_the_tokens_are_returned_on_request() -> None:
    answer = ask(TOKENIZE, prompt="The fox", return_token_strs=True)
    assert answer["token_strs"][0] == "<s>"
    assert "".join(answer["token_strs"][1:]).strip() == "The fox"
    assert len(answer["token_strs"]) == answer["count"]


@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_detokenize_undoes_tokenize(kind: str, text: str) -> None:
    tokens = ask(TOKENIZE, kind, prompt=text, add_special_tokens=False, max_seq_len=10_000)["tokens"]
    assert ask(DETOKENIZE, kind, tokens=tokens)["prompt"] == tiny(kind).decode(tokens)


def test_special_tokens_are_detokenized_to_their_names() -> None:
    tokenizer = tiny("sentencepiece")
    ids = tokenizer.encode("The fox", bos=True, eos=True)
    assert ask(DETOKENIZE, tokens=ids)["prompt"] == "<s>The fox</s>"
    assert ask(DETOKENIZE, tokens=[]) == {"prompt": ""}


def test_both_are_beside_and_below_v1() -> None:
    assert {"tokenize", "detokenize", "v1/tokenize", "v1/detokenize"} <= QUERIES.keys()


def test_what_exceeds_the_context_is_counted_unless_it_is_much_longer() -> None:
    """A client asks to learn by how much; but what cannot fit however it is tokenized would take seconds."""
    assert ask(TOKENIZE, prompt="é" * 100)["count"] > MAX_SEQ_LEN
    assert ask(COUNT, messages=[{"role": "user", "content": "é" * 100}])["input_tokens"] > MAX_SEQ_LEN
    for special in (True, False):
        error = refusal(TOKENIZE, prompt="x" * 900_000, add_special_tokens=special)
        assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    huge = [{"role": "user", "content": "x" * 900_000}]
    assert refusal(TOKENIZE, messages=huge).param == refusal(COUNT, messages=huge).param == "messages"


def test_an_answer_that_torchserve_cannot_carry_is_refused() -> None:
    error = refusal(TOKENIZE, prompt="☃" * 500_000, return_token_strs=True, max_seq_len=10**6)
    assert (error.status, error.code, error.param) == (400, "answer_too_large", "prompt")
    assert str(MAX_ANSWER_BYTES) in error.message


TOOL = {"type": "function", "function": {"name": "f"}}
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (TOKENIZE, {}, "missing_field", "prompt"),
    (TOKENIZE, {"prompt": "a", "messages": HI}, "conflicting_fields", "prompt"),
    (TOKENIZE, {"prompt": 5}, "invalid_type", "prompt"),
    (TOKENIZE, {"prompt": ["a"]}, "invalid_type", "prompt"),
    (
        TOKENIZE,
        {"prompt": "a", "tools": [TOOL]},
        "conflicting_fields",
        "tools",
    ),
    (TOKENIZE, {"prompt": "a", "continue_final_message": True}, "conflicting_fields", "continue_final_message"),
    (TOKENIZE, {"prompt": "a", "chat_template_kwargs": {"b": 1}}, "conflicting_fields", "chat_template_kwargs"),
    (TOKENIZE, {"messages": HI, "chat_template_kwargs": 1}, "invalid_type", "chat_template_kwargs"),
    (TOKENIZE, {"prompt": "a", "add_special_tokens": 1}, "invalid_type", "add_special_tokens"),
    (TOKENIZE, {"prompt": "a", "temperature": 1}, "unknown_field", "temperature"),
    (TOKENIZE, {"messages": []}, "empty_messages", "messages"),
    (TOKENIZE, {"messages": [{"role": "user"}]}, "invalid_type", "messages[0].content"),
    (TOKENIZE, {"messages": [{"role": "robot", "content": "a"}]}, "invalid_role", "messages[0].role"),
    (TOKENIZE, {"messages": [*HI, *HI]}, "invalid_role_order", "messages[1].role"),
    (TOKENIZE, {"messages": HI, "add_special_tokens": True}, "unsupported_value", "add_special_tokens"),
    (TOKENIZE, {"messages": HI, "chat_template": "x"}, "unsupported_value", "chat_template"),
    (DETOKENIZE, {}, "missing_field", "tokens"),
    (DETOKENIZE, {"tokens": "a"}, "invalid_type", "tokens"),
    (DETOKENIZE, {"tokens": [1, "a"]}, "invalid_type", "tokens[1]"),
    (DETOKENIZE, {"tokens": [1, -1]}, "token_out_of_range", "tokens[1]"),
    (DETOKENIZE, {"tokens": [1, 10**6]}, "token_out_of_range", "tokens[1]"),
    (COUNT, {}, "missing_field", "messages"),
    (COUNT, {"messages": [{"role": "user", "content": "[INST]"}]}, "special_tags_not_allowed", "messages[0]"),
    (COUNT, {"system": "[INST]", "messages": HI}, "special_tags_not_allowed", "system"),
]


@pytest.mark.parametrize(("route", "body", "code", "param"), BAD, ids=[f"{row[0]} {row[1]}"[:60] for row in BAD])
def test_a_bad_query_is_refused_by_name(route: str, body: dict[str, Any], code: str, param: str) -> None:
    error = refusal(route, **body)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert "\n" not in error.message


@pytest.mark.parametrize("route", [TOKENIZE, DETOKENIZE, COUNT])
def test_another_model_is_not_found(route: str) -> None:
    body = {TOKENIZE: {"prompt": "a"}, DETOKENIZE: {"tokens": [1]}, COUNT: {"messages": HI}}[route]
    error = refusal(route, model="gpt-4o", **body)
    assert (error.status, error.code) == (404, "model_not_found")
