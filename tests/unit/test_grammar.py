"""Grammars against jsonschema and re, over vocabularies of every kind."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import pytest
import torch

from llama_tp.text.grammar import Grammar, GrammarError
from llama_tp.text.grammar_compiler import MAX_SOURCE, GrammarCompiler
from tests.random_text import mask_of, random_text
from tests.schemas import SCHEMAS
from tests.unit.text_fixtures import tiny

KINDS = ("sentencepiece", "tiktoken", "tokenizer.json")
HOSTILE = {
    "a thousand patterns": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(1000)]},
    "twenty patterns": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(20)]},
    "a large text": {"enum": ["x" * MAX_SOURCE]},
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, num_rows=tokenizer.vocab_size)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_that_ends_is_valid_under_its_schema(name, tokenizer, compiler):
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    grammar = compiler.compile(Grammar.json_schema(SCHEMAS[name]))
    texts = [random_text(grammar, tokenizer, torch.Generator().manual_seed(seed)) for seed in range(8)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 2
    for text in ended:
        validator.validate(json.loads(text))


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex("(ab|c){2}/[0-9]+"), r"(ab|c){2}/[0-9]+"),
        (Grammar.choice(["yes", "no", 'a "b"\n']), r'yes|no|a "b"\n'),
        (Grammar.of_notation('start: "x" DIGITS\nDIGITS: /[0-9]{2}/'), "x[0-9]{2}"),
        (Grammar.of_notation('root ::= "x" tail\ntail ::= [0-9] | "y" tail'), "xy*[0-9]"),
    ],
)
def test_a_text_matches_its_regular_expression_choice_or_grammar(grammar, pattern, tokenizer, compiler):
    compiled = compiler.compile(grammar)
    for seed in range(10):
        text = random_text(compiled, tokenizer, torch.Generator().manual_seed(seed))
        assert text is None or re.fullmatch(pattern, text), text


def test_an_answer_of_its_own_may_begin_with_the_space_that_the_vocabulary_drops(tokenizer, compiler):
    for begins, expected in ((True, tokenizer.drops_leading_space), (False, False)):
        state = compiler.compile(Grammar.regex("[a-z]+"), begins_text=begins).start()
        firsts = {tokenizer.token_bytes(token)[:1] for token in mask_of(state, tokenizer.vocab_size)}
        assert (b" " in firsts) == expected


def test_no_mask_has_a_special_token_but_the_ends(tokenizer, compiler):
    state = compiler.compile(Grammar.regex("(.|\\n)*")).start()
    allowed = set(mask_of(state, tokenizer.vocab_size))
    assert tokenizer.stop_ids == allowed.intersection(tokenizer.special_ids.values())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_within_a_second(name, compiler):
    compiler.compile(Grammar.json_object())  # the process that checks is running
    start = time.process_time()
    with pytest.raises(GrammarError, match=r"CPU time|characters|too many|fuel|empty"):
        compiler.compile(Grammar.json_schema(HOSTILE[name]))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.json_schema({"not": {"type": "string"}}), "not"),
        (Grammar.json_schema({"$ref": "http://localhost:1/schema"}), "retrieving it failed"),
        (Grammar.json_schema({"$ref": "file:///etc/passwd"}), "retrieving it failed"),
        (Grammar.json_schema(False), "Unsatisfiable"),
        (Grammar.json_schema({"type": "strin"}), "strin"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-ahead"),
        (Grammar.of_notation("hello"), "notation"),
        (Grammar.of_notation("start: missing"), "missing"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_with_its_reason(grammar, reason, compiler):
    for _ in range(2):  # the second time from the cache
        with pytest.raises(GrammarError, match=reason) as caught:
            compiler.compile(grammar)
        assert "\n" not in str(caught.value)


def test_a_grammar_is_compiled_once(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, num_rows=tokenizer.vocab_size)
    assert compiler.compile(Grammar.json_object()) is compiler.compile(Grammar.json_object())
    compiler.close()


def test_a_state_is_not_affected_by_others_of_its_grammar(tokenizer, compiler):
    grammar = compiler.compile(Grammar.regex("[ab]c*"))
    one, other = grammar.start(), grammar.start()
    before = mask_of(other, grammar.num_tokens)
    one.accept(mask_of(one, grammar.num_tokens)[0])
    mask_of(one, grammar.num_tokens)
    assert mask_of(other, grammar.num_tokens) == before
