"""Tokenizers in GGUF files give the ids of the tokenizers that they were made from."""

from __future__ import annotations

import json
from base64 import b64encode

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_tp.checkpoint.convert import MODEL_ARGS
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.gguf_tokenizer import write_tokenizer
from llama_tp.cli.checkpoints import convert
from llama_tp.text import load_tokenizer
from tests.hard_texts import HARD_TEXTS
from tests.tiny_gguf import TEMPLATE, add_byte_level_bpe, add_sentencepiece, write_model
from tests.tiny_huggingface import tiny_model
from tests.tiny_text import CORPUS, make_sentencepiece_model, make_tiktoken_model, make_tokenizer_json

ROWS = 416
HARD = (*CORPUS, *HARD_TEXTS)


def write(folder, add):
    path = folder / "a.gguf"
    write_model(path, tiny_model("llama"), tokenizer=add)
    return path


def loaded(path, folder):
    """The tokenizer of the file, by itself."""
    write_tokenizer(GGUFReader(path).metadata, folder)
    return load_tokenizer(folder, embedding_rows=ROWS)


def trained(pre_tokenizer, normalizer=None):
    """(vocabulary, merges)."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *HARD] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


ORACLES = {
    "qwen2": lambda vocab, merges: Qwen2Tokenizer(vocab=vocab, merges=merges),
    "gpt-2": lambda vocab, merges: GPT2Tokenizer(vocab=vocab, merges=merges),
}


@pytest.mark.parametrize("pre", ORACLES)
def test_ids_of_byte_level_bpe_are_those_of_transformers(tmp_path, pre):
    # words of several digits, so that a rule for digits can be seen
    words = pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab, merges = trained(pre_tokenizers.Sequence([words, byte_level]), normalizers.NFC())
    oracle = ORACLES[pre](dict(vocab), list(merges))
    path = write(tmp_path, lambda writer: add_byte_level_bpe(writer, vocab, merges, pre, rows=ROWS))
    tokenizer = loaded(path, tmp_path)
    for text in HARD:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"], text


def test_ids_of_smollm_s_are_those_of_its_tokenizer_json(tmp_path):
    (tmp_path / "original").mkdir()
    definition = json.loads(make_tokenizer_json(tmp_path / "original").read_text())
    expected = load_tokenizer(tmp_path / "original")
    added = {token["content"]: token for token in definition["added_tokens"]}
    vocab = {**definition["model"]["vocab"], **{content: token["id"] for content, token in added.items()}}

    def add(writer):
        control = [content for content, token in added.items() if token["special"]]
        user_defined = added.keys() - control
        merges = definition["model"]["merges"]
        add_byte_level_bpe(writer, vocab, merges, "smollm", control=control, user_defined=user_defined, rows=ROWS)

    tokenizer = loaded(write(tmp_path, add), tmp_path)
    assert {"<|im_end|>", "<|tool|>"} <= tokenizer.special_ids.keys()
    assert "<think>" not in tokenizer.special_ids
    for text in (*HARD, "a<think>b</think>", "<|im_start|>user"):
        assert tokenizer.encode(text) == expected.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = ["", "<|im_start|>", "user\nhello 12", "<|im_end|>", "\n"]
    assert tokenizer.encode_rendered(rendered) == expected.encode_rendered(rendered)


def test_ids_of_llama_3_s_are_those_of_metas_file(tmp_path):
    (tmp_path / "original").mkdir()
    expected = load_tokenizer(make_tiktoken_model(tmp_path / "original"))
    vocab, merges = TikTokenConverter(str(tmp_path / "original" / "tokenizer.model")).extract_vocab_merges_from_model(
        str(tmp_path / "original" / "tokenizer.model")
    )
    rows = max(vocab.values()) + 1
    assert rows <= ROWS
    tokenizer = loaded(write(tmp_path, lambda writer: add_byte_level_bpe(writer, vocab, merges, "llama-bpe")), tmp_path)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text), text
        assert tokenizer.decode(ids) == text


LLAMA_3 = (  # as Meta's package has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (  # as tekken.json has it
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pre", "adds_bos"), [("tekken", True), ("smaug-bpe", False)])
def test_ids_under_rules_of_tiktoken_vocabularies_are_those_of_tiktoken(tmp_path, pre, adds_bos):
    """With merges across everything, so that each border of a word shows."""
    file = str(make_tiktoken_model(tmp_path))
    ranks = load_tiktoken_bpe(file)
    for pair in sorted({text[i : i + 2] for text in HARD for i in range(len(text))} - {""}):
        if (raw := pair.encode())[:-1] in ranks and len(raw) == 2:
            ranks.setdefault(raw, len(ranks))
    lines = "".join(f"{b64encode(raw).decode()} {rank}\n" for raw, rank in ranks.items())
    (tmp_path / "ranks").write_text(lines)
    oracle = tiktoken.Encoding(
        pre, pat_str=TEKKEN if pre == "tekken" else LLAMA_3, mergeable_ranks=ranks, special_tokens={}
    )
    vocab, merges = TikTokenConverter(file).extract_vocab_merges_from_model(str(tmp_path / "ranks"))

    def add(writer):
        add_byte_level_bpe(writer, vocab, merges, pre)
        writer.add_bos_token_id(0)

    write_model(tmp_path / "a.gguf", tiny_model("llama"), tokenizer=add)
    (tmp_path / "own").mkdir()
    write_tokenizer(GGUFReader(tmp_path / "a.gguf").metadata, tmp_path / "own")
    tokenizer = load_tokenizer(tmp_path / "own")
    assert tokenizer.adds_bos is adds_bos
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"byte_fallback": False}], ids=str)
def test_ids_of_sentencepiece_s_are_those_of_sentencepiece(tmp_path, options):
    (tmp_path / "original").mkdir()
    library = SentencePieceProcessor(model_file=str(make_sentencepiece_model(tmp_path / "original", **options)))
    expected = load_tokenizer(tmp_path / "original")

    def add(writer):
        add_sentencepiece(writer, library)
        writer.add_add_space_prefix(options.get("add_dummy_prefix", True))

    tokenizer = loaded(write(tmp_path, add), tmp_path)
    assert tokenizer.kind == "sentencepiece"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.special_ids == expected.special_ids
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text), text
        assert tokenizer.decode(ids) == expected.decode(ids)
        if not {"<s>", "</s>", "<unk>"} & set(library.encode(text, out_type=str)):
            assert ids == library.encode(text), text


def test_a_written_sentencepiece_model_says_what_llama_s_own_says(tmp_path):
    """By the messages' own definition, which needs protobuf."""
    from sentencepiece import sentencepiece_model_pb2

    original = make_sentencepiece_model(tmp_path)
    library = SentencePieceProcessor(model_file=str(original))
    ours, theirs = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    theirs.ParseFromString(original.read_bytes())
    (tmp_path / "ours").mkdir()
    loaded(write(tmp_path, lambda writer: add_sentencepiece(writer, library)), tmp_path / "ours")
    ours.ParseFromString((tmp_path / "ours" / "tokenizer.model").read_bytes())
    for our, their in zip(ours.pieces, theirs.pieces, strict=True):
        assert (our.piece, our.score, our.type) == (their.piece, their.score, their.type)
    for field in ("model_type", "vocab_size", "byte_fallback", "unk_piece", "bos_piece", "eos_piece"):
        assert getattr(ours.trainer_spec, field) == getattr(theirs.trainer_spec, field), field
    for field in ("name", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(ours.normalizer_spec, field) == getattr(theirs.normalizer_spec, field), field


def test_convert_takes_the_tokenizer_from_the_file(tmp_path):
    library = SentencePieceProcessor(model_file=str(make_sentencepiece_model(tmp_path)))

    def add(writer):
        add_sentencepiece(writer, library)
        writer.add_eot_token_id(300)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)

    convert(str(write(tmp_path, add)), str(tmp_path / "out"))
    tokenizer = load_tokenizer(tmp_path / "out", embedding_rows=ROWS)
    assert (tmp_path / "out" / MODEL_ARGS).is_file()
    assert tokenizer.encode("Once upon a time") == library.encode("Once upon a time")
    assert tokenizer.stop_ids == {2, 300}
    assert not tokenizer.adds_bos
    assert tokenizer.chat_template == TEMPLATE


def test_convert_prefers_the_tokenizer_that_it_is_given(tmp_path):
    path = write(tmp_path, lambda writer: writer.add_tokenizer_model("bert"))
    given = make_sentencepiece_model(tmp_path)
    convert(str(path), str(tmp_path / "out"), tokenizer=str(given))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == given.read_bytes()


@pytest.mark.parametrize(("pre", "adds_bos"), [("llama-bpe", True), ("qwen2", False), ("smollm", False)])
def test_a_prompt_begins_with_bos_as_in_llama_cpp_where_the_file_does_not_say(tmp_path, pre, adds_bos):
    vocab, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))

    def add(writer):
        add_byte_level_bpe(writer, vocab, merges, pre, control=("!",))
        writer.add_bos_token_id(vocab["!"])

    tokenizer = loaded(write(tmp_path, add), tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (vocab["!"], adds_bos)


def _bpe(**changes):
    def add(writer):
        values = {"pre": "qwen2", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [("a", "b")], **changes}
        add_byte_level_bpe(writer, values["vocab"], values["merges"], values["pre"])

    return add


def _pieces(*changes, scores=None):
    def add(writer):
        entries = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("ab", 1), ("bc", 1), ("a", 1)]
        for index, entry in changes:
            entries[index] = entry
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece for piece, _ in entries])
        writer.add_token_types([kind for _, kind in entries])
        writer.add_token_scores([-float(i) for i in range(len(entries))] if scores is None else scores)

    return add


def _key(add, **fields):
    def adds(writer):
        add(writer)
        for name, value in fields.items():
            writer.add_uint32(f"tokenizer.ggml.{name}", value)

    return adds


REFUSED = {
    "none": (lambda writer: None, "has no tokenizer; pass the model's tokenizer.json or tokenizer.model with --token"),
    "another kind": (lambda writer: writer.add_tokenizer_model("t5"), "has a tokenizer of kind 't5', 'gpt2' and 'lla"),
    "another rule for words": (_bpe(pre="deepseek-r1-qwen"), "pre='deepseek-r1-qwen' is not read; read: gpt-2, smollm"),
    "llama.cpp's own rule": (_bpe(pre="default"), "tokenizer.ggml.pre='default' is not read"),
    "a merge of nothing": (_bpe(merges=[("a", "c")]), "'a c' is not a merge of two tokens"),
    "a merge without space": (_bpe(merges=[("ab",)]), "'ab' is not a merge of two tokens"),
    "eos beyond the end": (_key(_bpe(), eos_token_id=3), "tokenizer.ggml.eos_token_id=3, but there are 3 tokens"),
    "a number for a flag": (_key(_bpe(), add_bos_token=1), "tokenizer.ggml.add_bos_token=1 must be true or false"),
    "a number for a template": (
        lambda writer: (_bpe()(writer), writer.add_uint32("tokenizer.chat_template", 7)),
        "tokenizer.chat_template=7 must be a string",
    ),
    "a piece twice": (_pieces((4, ("ab", 1))), "6 tokens (5 distinct) with 6 types"),
    "no unknown": (_pieces((0, ("x", 1))), "0 unknown tokens, expected 1"),
    "one byte": (_pieces((5, ("<0x00>", 6))), "1 tokens for bytes, expected 256 or none"),
    "a type of its own": (_pieces((5, ("a", 9))), "a token of type 9"),
    "scores for some": (_pieces(scores=[0.0]), "6 tokens with 1 scores"),
    "scores that say nothing": (_pieces(scores=[-1000.0] * 6), "all tokens have the same score"),
    "tokens that are numbers": (
        lambda writer: (writer.add_tokenizer_model("gpt2"), writer.add_array("tokenizer.ggml.tokens", [1, 2])),
        "tokenizer.ggml.tokens=[1, 2] must be a list of strings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_is_not_read_is_refused_with_the_remedy(tmp_path, case):
    add, words = REFUSED[case]
    path = write(tmp_path, add)
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        convert(str(path), str(tmp_path / "out"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    if case not in ("eos beyond the end", "tokens that are numbers", "a number for a flag"):
        assert "--tokenizer" in str(error.value)
    assert not (tmp_path / "out").exists()
