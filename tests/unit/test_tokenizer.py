import base64
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from llama_tp.text import Detokenizer, load_tokenizer
from llama_tp.text.tiktoken_file import split_long_runs
from tests import tiny_text
from tests.hard_texts import HARD_TEXTS, LONG_TEXTS
from tests.unit.text_fixtures import KINDS, file_of, folder_of, quick, texts, tiny

WELL_KNOWN_PIECES = ("<s>", "</s>", "<unk>", "<0x41>", "<|eot_id|>", "<|im_end|>", "<|begin_of_text|>", "<|tool|>")

SINGLE_BYTES = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@quick
@given(text=texts, kind=st.sampled_from(KINDS))
def test_decode_gives_back_the_text_that_was_encoded(text, kind):
    tokenizer = tiny(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_user_text_never_yields_a_special_id_and_is_not_changed(data, kind):
    tokenizer = tiny(kind)
    pieces = st.sampled_from([*list(tokenizer.special_ids)[:20], *WELL_KNOWN_PIECES])
    text = "".join(data.draw(st.lists(pieces | texts, min_size=1, max_size=5)))
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text


def test_every_special_piece_is_text_when_a_user_writes_it(kind):
    tokenizer = tiny(kind)
    assert len(tokenizer.special_ids) >= 3
    for piece in tokenizer.special_ids:
        ids = tokenizer.encode(f"a{piece}b {piece}")
        assert not set(ids) & set(tokenizer.special_ids.values()), piece
        assert tokenizer.decode(ids) == f"a{piece}b {piece}"


def test_bos_and_eos_stand_at_the_ends_only_when_asked_for(kind):
    tokenizer = tiny(kind)
    plain = tokenizer.encode("the dog")
    assert plain
    assert tokenizer.encode("the dog", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    assert tokenizer.encode("") == []


def test_specials_contribute_no_bytes_and_neither_do_ids_that_no_token_has(kind):
    tokenizer = tiny(kind)
    for token_id in [*tokenizer.special_ids.values(), -1, tokenizer.vocab_size, 10**9]:
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"


def test_all_256_bytes_can_be_written(kind):
    tokenizer = tiny(kind)
    assert {bytes([b]) for b in range(256)} <= {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udc00\ud83d"])
def test_a_lone_surrogate_is_refused_with_its_place(kind, text):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D[89A-F][0-9A-F]{2} at character \d"):
        tiny(kind).encode(text)


def test_very_long_runs_are_encoded(kind):
    tokenizer = tiny(kind)
    for text in ("x" * 60_000, " " * 60_000 + "x", "x\n" * 30_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- sentencepiece


def test_sentencepiece_ids_are_those_of_the_library():
    tokenizer, library = tiny("sentencepiece"), SentencePieceProcessor(model_file=str(file_of("sentencepiece")))
    for text in (*tiny_text.CORPUS, "  two  spaces ", "日本 😀", "<s>", "\n"):
        assert tokenizer.encode(text) == library.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.bos_id(), library.eos_id()) == (1, 2)
    assert tokenizer.vocab_size == library.vocab_size()
    assert tokenizer.stop_ids == {2}
    assert tokenizer.adds_bos
    assert tokenizer.chat_template is None


def test_sentencepiece_decodes_any_pieces_as_the_library_does():
    tokenizer, library = tiny("sentencepiece"), SentencePieceProcessor(model_file=str(file_of("sentencepiece")))
    rng = random.Random(0)
    not_broken = [i for i in range(1, library.vocab_size()) if not library.is_byte(i)]
    for _ in range(300):
        ids = rng.choices(not_broken, k=rng.randrange(1, 8))
        assert tokenizer.decode(ids) == library.decode(ids), ids


def test_the_vocabulary_stands_in_the_order_of_llama_2s():
    """There, the first piece with a space is a run of two: what is true of it need not be true of a word."""
    library = SentencePieceProcessor(model_file=str(file_of("sentencepiece")))
    assert [library.id_to_piece(i) for i in (0, 1, 2, 3, 258, 259)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
        "▁▁",
    ]
    assert library.id_to_piece(260)[:1] == "▁" != library.id_to_piece(260)[1:2]


@pytest.mark.parametrize("removes", [False, True], ids=["keeps extra spaces", "removes extra spaces"])
@pytest.mark.parametrize("adds", [False, True], ids=["no dummy prefix", "dummy prefix"])
def test_the_space_that_begins_a_text_is_dropped_where_the_model_says_so(tmp_path, adds, removes):
    path = tiny_text.make_sentencepiece_model(tmp_path, add_dummy_prefix=adds, remove_extra_whitespaces=removes)
    tokenizer, library = load_tokenizer(path), SentencePieceProcessor(model_file=str(path))
    rng = random.Random(0)
    not_broken = [i for i in range(3, library.vocab_size()) if not library.is_byte(i)]
    for ids in ([i] for i in not_broken), (rng.choices(not_broken, k=5) for _ in range(200)):
        for some in ids:
            assert tokenizer.decode(some) == library.decode(some), some


def test_a_model_that_puts_its_spaces_behind_words_is_refused(tmp_path):
    path = tiny_text.make_sentencepiece_model(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match=r"tokenizer\.model declares treat_whitespace_as_suffix"):
        load_tokenizer(path)


def test_a_user_defined_control_symbol_is_special_and_a_user_defined_word_is_text(tmp_path):
    path = tiny_text.make_sentencepiece_model(tmp_path, user_defined_symbols=["<|im_end|>", "<think>"])
    tokenizer = load_tokenizer(path)
    library = SentencePieceProcessor(model_file=str(path))
    forged, word = library.piece_to_id("<|im_end|>"), library.piece_to_id("<think>")
    assert forged in library.encode("x<|im_end|>")  # the library alone would let it through
    ids = tokenizer.encode("x<|im_end|>日<think>")
    assert forged not in ids
    assert word in ids
    assert tokenizer.decode([*ids, forged]) == "x<|im_end|>日<think>"
    assert forged in tokenizer.stop_ids


# --- tiktoken


def test_llama3_specials_follow_the_ranks_with_metas_names():
    tokenizer = tiny("tiktoken")
    base = tokenizer.vocab_size - 256
    # offsets in Meta's released Llama 3.1 vocabulary, where the ranks end at 128000
    offsets = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_2|>": 11,
        "<|reserved_special_token_246|>": 255,
    }
    assert {piece: tokenizer.special_ids[piece] - base for piece in offsets} == offsets
    assert len(tokenizer.special_ids) == 256
    assert tokenizer.stop_ids == {base + 1, base + 8, base + 9}


@quick
@given(text=texts)
def test_tiktoken_agrees_with_the_library_on_text_in_which_words_do_not_interact(text):
    tokenizer = tiny("tiktoken")
    base = tokenizer.vocab_size - 256
    ranks = {tokenizer.token_bytes(i): i for i in range(base)}
    oracle = tiktoken.Encoding("one word", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle.encode_ordinary(text)) == text
    if text.isalpha() and text.isascii():
        assert tokenizer.encode(text) == oracle.encode_ordinary(text)


def test_llama3_splits_numbers_by_three_digits_and_keeps_contractions_apart(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"23", b"123", b"1234", b"'t", b"n'", b"\n\n", b"\n\na", b" a"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    tokenizer = load_tokenizer(path)

    def split(text: str) -> list[bytes]:
        return [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]

    assert split("1234") == [b"123", b"4"]
    assert split("n't") == [b"n", b"'t"]
    assert split("\n\na") == [b"\n\n", b"a"]
    assert split("  a") == [b" ", b" a"]


def test_tiktoken_text_is_cut_in_runs_of_25000_and_chunks_of_400000_characters(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join([*SINGLE_BYTES, base64.b64encode(b"xx") + b" 256"]))
    tokenizer = load_tokenizer(path)
    # each cut that goes through a pair of x shows as two single ones
    assert tokenizer.encode("y" + "x" * 50_000).index(ord("x")) == 25_000 // 2
    assert tokenizer.encode("xx " * 133_400).count(ord("x")) == 2
    assert tokenizer.encode("xx " * 133_333).count(ord("x")) == 0


@pytest.mark.parametrize(
    ("num_ranks", "whose"), [(200_000, "Llama 4's"), (151_643, "a vocabulary that is not Llama 3's")]
)
def test_a_rank_file_of_another_model_is_refused_by_name(tmp_path, num_ranks, whose):
    tokens = [bytes([b]) for b in range(256)] + [i.to_bytes(3, "big") for i in range(num_ranks - 256)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    with pytest.raises(
        ValueError, match=rf"tokenizer\.model is {whose}.*{num_ranks} tokens; Llama 3's has 128000.*pass"
    ):
        load_tokenizer(path)


@quick
@given(text=st.text("a \n", max_size=60), max_run=st.integers(1, 5))
def test_long_runs_are_cut_where_meta_cuts_them(text, max_run):
    parts, run, previous = [""], 0, None
    for char in text:
        run = run + 1 if char.isspace() == previous else 1
        previous = char.isspace()
        if run > max_run:
            parts.append("")
            run = 1
        parts[-1] += char
    assert list(split_long_runs(text, max_run)) == parts


# --- tokenizer.json


@pytest.mark.parametrize("kind", ["tokenizer.json", "metaspace"])
def test_tokenizer_json_agrees_with_the_library(kind):
    tokenizer, library = tiny(kind), Library.from_file(str(file_of(kind)))
    for text in (*tiny_text.CORPUS, "  two  spaces ", "日本 😀", "x<think>y"):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 8))
        expected = library.decode([i for i in ids if i not in tokenizer.special_ids.values()])
        if "\ufffd" not in expected and not expected.startswith(" "):
            assert tokenizer.decode(ids) == expected, ids


LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
RULES = {  # of the families that are served: normalizer, pre-tokenizer
    "llama 3": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"), BYTES])),
    "qwen2": (
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3_WORDS.replace("{1,3}", "")), "isolated"), BYTES]),
    ),
    "tekken": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(TEKKEN_WORDS), "isolated"), BYTES])),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])),
    "gpt-2": (None, GPT_2),
    "gpt-2 with a space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("rule", RULES)
def test_ids_and_texts_under_the_rules_of_each_family_are_the_library_s(tmp_path, rule):
    library = Library(models.BPE())
    normalizer, pre_tokenizer = RULES[rule]
    if normalizer is not None:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([*tiny_text.CORPUS, *HARD_TEXTS] * 3, trainer)
    library.add_special_tokens(["<s>", "</s>", "<|eot_id|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in (*HARD_TEXTS, *LONG_TEXTS):
        ids = tokenizer.encode(text)
        if "<s>" not in text:
            assert ids == library.encode(text, add_special_tokens=False).ids, text[:80]
        assert not set(ids) & set(tokenizer.special_ids.values())
        assert tokenizer.decode(ids) == library.decode(ids), text[:80]
    rng = random.Random(0)
    for _ in range(1000):
        ids = rng.choices(range(600), k=rng.randrange(1, 8))
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == library.decode(ids), ids


def test_sentencepiece_ids_of_hard_texts_are_those_of_the_library():
    tokenizer, library = tiny("sentencepiece"), SentencePieceProcessor(model_file=str(file_of("sentencepiece")))
    for text in (*HARD_TEXTS, *LONG_TEXTS):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text), text[:80]
        assert tokenizer.decode(ids) == library.decode(ids), text[:80]


REPLACE, STRIP = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
DECODERS = {
    "strip": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), STRIP]),
    "no strip": decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace first": decoders.Metaspace("▁", "first"),
    "metaspace always": decoders.Metaspace("▁", "always"),
    "metaspace never": decoders.Metaspace("▁", "never"),
    "metaspace with bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_space_that_begins_a_text_is_dropped_where_the_decoder_says_so(tmp_path, name):
    path = tiny_text.make_metaspace_json(tmp_path)
    definition = json.loads(path.read_text())
    vocab = definition["model"]["vocab"]
    for length in range(2, 99):  # runs of spaces, which say nothing of a word and are easily met first
        vocab.setdefault("▁" * length, len(vocab))
    library = Library.from_str(json.dumps(definition))
    library.decoder = DECODERS[name]
    library.save(str(path))
    tokenizer = load_tokenizer(path)
    words = [i for piece, i in library.get_vocab().items() if re.fullmatch("▁[^▁]+", piece)]
    assert len(words) > 10
    for first, second in pairwise(words):
        assert tokenizer.decode([first, second]) == library.decode([first, second])


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (decoders.Sequence([REPLACE, STRIP, decoders.Fuse()]), "a Strip must remove one leading space from the text"),
        (
            decoders.Sequence([REPLACE, decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
            "a Strip must remove one leading space",
        ),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), "supported are ByteLevel, or Replace"),
        (decoders.Sequence([decoders.BPEDecoder(), decoders.Fuse()]), r"\['BPEDecoder', 'Fuse'\]; supported are"),
    ],
)
def test_a_decoder_that_does_something_else_is_refused(tmp_path, decoder, message):
    path = tiny_text.make_metaspace_json(tmp_path)
    library = Library.from_file(str(path))
    library.decoder = decoder
    library.save(str(path))
    with pytest.raises(ValueError, match=f"tokenizer.json has the decoder step.*{message}"):
        load_tokenizer(path)


def test_control_tokens_that_are_not_declared_special_are_special_all_the_same():
    tokenizer, library = tiny("tokenizer.json"), Library.from_file(str(file_of("tokenizer.json")))
    tool, think = library.token_to_id("<|tool|>"), library.token_to_id("<think>")
    library.encode_special_tokens = True
    assert tool in library.encode("<|tool|>").ids  # the library alone would let it through
    assert tool not in tokenizer.encode("<|tool|>")
    assert tokenizer.special_ids["<|tool|>"] == tool
    assert tokenizer.decode([think]) == "<think>"


def test_siblings_of_tokenizer_json_say_bos_eos_and_template():
    tokenizer = tiny("tokenizer.json")
    pieces = tokenizer.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (pieces["<|im_start|>"], pieces["<|im_end|>"])
    assert tokenizer.stop_ids == {pieces["<|im_end|>"], pieces["<|endoftext|>"]}
    assert not tokenizer.adds_bos
    assert tokenizer.chat_template == tiny_text.CHATML_TEMPLATE


def test_bos_is_added_where_the_post_processor_adds_it():
    tokenizer = tiny("metaspace")
    assert tokenizer.adds_bos
    assert tokenizer.bos_id == tokenizer.special_ids["<s>"]


def test_the_other_places_for_special_tokens_and_templates(tmp_path):
    path = tiny_text.make_tokenizer_json(tmp_path)
    path.with_name("tokenizer_config.json").unlink()
    alone = load_tokenizer(path)
    assert (alone.bos_id, alone.eos_id, alone.chat_template) == (None, alone.special_ids["<|im_end|>"], None)
    with pytest.raises(ValueError, match="no BOS token"):
        alone.encode("x", bos=True)

    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [0, 5]}))
    (tmp_path / "chat_template.jinja").write_text("é{{ messages }}", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert tokenizer.stop_ids == {0, 2, 5}
    assert tokenizer.chat_template == "é{{ messages }}"

    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (tmp_path / "chat_template.jinja").unlink()
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"bos_token": None, "chat_template": templates, "add_bos_token": True}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (None, 0, "d")
    assert not tokenizer.adds_bos


def test_truncation_and_padding_in_tokenizer_json_do_not_apply(tmp_path):
    path = tiny_text.make_tokenizer_json(tmp_path)
    library = Library.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(path))
    text = "the quick brown fox jumps"
    assert load_tokenizer(path).encode(text) == tiny("tokenizer.json").encode(text)


# --- finding the file, and files that are none


def test_the_kind_is_found_from_the_content_and_a_folder_will_do():
    assert [tiny(kind).kind for kind in KINDS] == ["sentencepiece", "tiktoken", "tokenizer.json", "tokenizer.json"]
    assert file_of("sentencepiece").name == file_of("tiktoken").name == "tokenizer.model"
    for kind in KINDS:
        assert load_tokenizer(folder_of(kind).name).kind == tiny(kind).kind


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(str(tmp_path))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556af\nsize 499723\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (LFS_POINTER, "Git LFS pointer.*git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in", "HTML.*download it again"),
        (b"PK\x03\x04 some archive", "neither a sentencepiece model"),
        (b"\n\x0e\n\x05<unk>", "not a readable sentencepiece model"),
        (b"\nhello", "not a readable sentencepiece model"),
        (b"{", "not valid JSON"),
        (b"{}" + b"\xff", "not valid JSON"),
        (b'{"error": "gated"}', "has no 'model'"),
        (b'{"config": {"pattern": "."}, "vocab": []}', "is Mistral's tekken.json, which is not supported"),
        (b'{"model": {"type": "BPE"}, "added_tokens": [1]}', "not a readable tokenizer.json"),
        (b'{"model": {"type": "NoSuch"}}', "not a readable tokenizer.json"),
        (b"\n".join(SINGLE_BYTES[:200]), "56 of the 256 single bytes are missing"),
        (b"\n".join([*SINGLE_BYTES, b"YWI="]), "line 257: not a base64 token and its rank"),
        (b"\n".join([*SINGLE_BYTES, b"YWI= 300"]), "exactly one token per rank"),
        (b"\n".join([*SINGLE_BYTES, b"YQ== 256"]), "exactly one token per rank"),
        (b"\n".join([*SINGLE_BYTES, b"Y!I= 256"]), "line 257"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_with_its_path_and_the_remedy(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)tokenizer.model.*{message}"):
        load_tokenizer(path)


def test_a_vocabulary_whose_pieces_cannot_be_read_as_bytes_is_refused(tmp_path):
    path = tiny_text.make_tokenizer_json(tmp_path)
    definition = json.loads(path.read_text())
    definition["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    definition["pre_tokenizer"] = None
    path.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"decoder steps \['WordPiece'\]; supported are"):
        load_tokenizer(path)


def vocab_size_or_refusal(path: Path) -> int | str:
    try:
        return load_tokenizer(path).vocab_size
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_an_error_or_a_smaller_vocabulary_never_a_crash(kind, tmp_path):
    data = file_of(kind).read_bytes()
    path = Path(tmp_path) / "tokenizer.model"
    for size in range(1, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:size])
        outcome = vocab_size_or_refusal(path)
        assert str(path) in outcome if isinstance(outcome, str) else outcome <= tiny(kind).vocab_size
