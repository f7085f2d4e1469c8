"""Published vocabularies: Mistral's, which has Llama 2's form and order, and Meta's for Llama 3 and 4."""

from __future__ import annotations

import base64
import json
import random

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_tp.checkpoint.formats.open import open_checkpoint, write_own_tokenizer
from llama_tp.text import Detokenizer, Tokenizer, chat_format, load_tokenizer
from tests.hard_texts import HARD_TEXTS, LONG_TEXTS
from tests.real_vocabularies import LLAMA, MISTRAL, extract, fetch
from tests.tiny_gguf import add_byte_level_bpe, add_sentencepiece, write_model
from tests.tiny_huggingface import tiny_model

pytestmark = pytest.mark.e2e

SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
WORDS = (
    "Paris",
    "the years",
    " ",
    "  indented",
    "\n",
    "\t",
    "日本",
    "😀",
    "naïve",
    "1969",
    ".",
    "(a, b)",
    "[INST]",
    "é",
)


def some_texts() -> list[str]:
    rng = random.Random(0)
    return [*WORDS, *("".join(rng.choices(WORDS, k=rng.randrange(1, 8))) for _ in range(300)), *HARD_TEXTS]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of the ids, one at a time."""
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def both(request, tmp_path_factory) -> tuple[Tokenizer, SentencePieceProcessor]:
    member = f"mistral_common/data/{SENTENCEPIECE[request.param]}"
    path = extract(MISTRAL, member, tmp_path_factory.mktemp(request.param))
    return load_tokenizer(path), SentencePieceProcessor(model_file=str(path))


def test_texts_are_encoded_and_decoded_as_sentencepiece_does(both):
    tokenizer, library = both
    for text in [*some_texts(), *LONG_TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text), text[:80]
        assert tokenizer.decode(ids) == library.decode(ids), text[:80]


def test_any_pieces_are_decoded_as_sentencepiece_does(both):
    tokenizer, library = both
    rng = random.Random(1)
    pieces = [i for i in range(library.vocab_size()) if not (library.is_byte(i) or library.is_unknown(i))]
    for _ in range(2000):
        ids = rng.choices(pieces, k=rng.randrange(1, 6))
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == library.decode(ids), ids


def test_a_prompt_and_its_completion_are_what_sentencepiece_decodes_of_both(both):
    tokenizer, library = both
    for text in some_texts():
        ids = library.encode(f"{text} Some years ago")
        for cut in range(1, len(ids)):
            detokenizer = Detokenizer(tokenizer, [tokenizer.bos_id, *ids[:cut]])
            completion = "".join(map(detokenizer.push, ids[cut:])) + detokenizer.flush()
            if "\ufffd" not in (prompt := library.decode(ids[:cut])):
                assert prompt + completion == library.decode(ids)


def test_vocabularies_with_control_tokens_for_inst_do_not_pass_for_llama_2s(both):
    tokenizer, library = both
    if library.piece_to_id("[INST]") == library.unk_id():
        assert chat_format("auto", tokenizer).name == "llama2"
        return
    with pytest.raises(ValueError, match=r"has \[INST\] as a control token"):
        chat_format("auto", tokenizer)


def test_llama_3s_ids_are_those_of_metas_own_package(tmp_path, monkeypatch):
    path = extract(LLAMA, "llama_models/llama3/tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(path, embedding_rows=128256)
    monkeypatch.syspath_prepend(fetch(*LLAMA))
    from llama_models.llama3.tokenizer import Tokenizer as MetasTokenizer

    meta = MetasTokenizer(path)
    named = {piece: i for piece, i in meta.special_tokens.items() if not piece.startswith(("<|reserved", "<|image"))}
    assert tokenizer.special_ids.items() >= named.items()  # <|image|> of Llama 3.2 renumbers those without a name
    cut = (
        "a b" * 140_000,
        "x" * 60_000,
        " " * 60_000,
        "ab " * 30_000 + "\n" * 26_000,
    )  # into parts, as documented there
    for text in [*some_texts(), *LONG_TEXTS, *cut]:
        ids = tokenizer.encode(text)
        assert ids == meta.encode(text, bos=False, eos=False), text[:80]
        assert tokenizer.decode(ids) == text
    rng = random.Random(2)
    for _ in range(3000):
        ids = rng.choices(range(128_000), k=rng.randrange(1, 9))
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == meta.decode(ids), ids
    assert tokenizer.special_ids["<|eot_id|>"] == 128009
    assert chat_format("auto", tokenizer).name == "llama3"


@pytest.mark.parametrize("version", SENTENCEPIECE)
def test_a_sentencepiece_vocabulary_gives_the_same_ids_from_a_gguf_file(version, tmp_path):
    path = extract(MISTRAL, f"mistral_common/data/{SENTENCEPIECE[version]}", tmp_path)
    library = SentencePieceProcessor(model_file=str(path))
    expected, found = load_tokenizer(path), through_gguf(tmp_path, lambda writer: add_sentencepiece(writer, library))
    assert (found.bos_id, found.eos_id, found.special_ids) == (expected.bos_id, expected.eos_id, expected.special_ids)
    for text in some_texts():
        ids = found.encode(text)
        assert ids == expected.encode(text), text
        assert found.decode(ids) == expected.decode(ids), text
    for text in some_texts():
        assert found.encode(text) == library.encode(text), text


def test_llama_3s_vocabulary_gives_the_same_ids_from_a_gguf_file(tmp_path):
    path = extract(LLAMA, "llama_models/llama3/tokenizer.model", tmp_path)
    expected = load_tokenizer(path, embedding_rows=128256)
    vocab, merges = TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))
    vocab |= expected.special_ids

    def add(writer):
        add_byte_level_bpe(writer, vocab, merges, "llama-bpe", control=expected.special_ids)
        writer.add_bos_token_id(128000)
        writer.add_eos_token_id(128009)

    found = through_gguf(tmp_path, add)
    assert found.special_ids == expected.special_ids
    assert (found.bos_id, found.eos_id, found.adds_bos) == (128000, 128009, True)
    for text in some_texts():
        ids = found.encode(text)
        assert ids == expected.encode(text), text
        assert found.decode(ids) == text
    assert chat_format("auto", found).name == "llama3"


def test_llama_3s_vocabulary_under_the_name_smaug_bpe_gives_the_same_ids(tmp_path):
    """The same rule, merges applied: no word of these texts is a token that merges do not reach."""
    path = extract(LLAMA, "llama_models/llama3/tokenizer.model", tmp_path)
    expected = load_tokenizer(path)
    vocab, merges = TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))
    found = through_gguf(tmp_path, lambda writer: add_byte_level_bpe(writer, vocab, merges, "smaug-bpe"))
    assert not found.adds_bos
    for text in [*some_texts(), *LONG_TEXTS]:
        assert found.encode(text) == expected.encode(text), text[:80]


@pytest.mark.parametrize("version", ["240718", "240911"])
def test_tekken_gives_the_ids_of_mistral_common_from_a_gguf_file(version, tmp_path):
    published = json.loads(extract(MISTRAL, f"mistral_common/data/tekken_{version}.json", tmp_path).read_bytes())
    num_specials = published["config"]["default_num_special_tokens"]
    entries = published["vocab"][: published["config"]["default_vocab_size"] - num_specials]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    # as mistral_common.tokens.tokenizers.tekken builds it
    library = tiktoken.Encoding(
        "tekken", pat_str=published["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    lines = "".join(f"{entry['token_bytes']} {entry['rank']}\n" for entry in entries)
    (tmp_path / "ranks").write_text(lines)
    vocab, merges = TikTokenConverter(str(tmp_path / "ranks")).extract_vocab_merges_from_model(str(tmp_path / "ranks"))
    specials = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, num_specials))]
    ids = {**{piece: i for i, piece in enumerate(specials)}, **{piece: i + num_specials for piece, i in vocab.items()}}

    def add(writer):
        add_byte_level_bpe(writer, ids, merges, "tekken", control=specials)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    found = through_gguf(tmp_path, add)
    assert (found.bos_id, found.eos_id, found.adds_bos) == (1, 2, True)
    for text in [*some_texts(), *LONG_TEXTS]:
        encoded = found.encode(text)
        assert encoded == [i + num_specials for i in library.encode_ordinary(text)], text[:80]
        assert found.decode(encoded) == text


def through_gguf(folder, add_tokenizer) -> Tokenizer:
    write_model(folder / "a.gguf", tiny_model("llama"), tokenizer=add_tokenizer)
    (folder / "own").mkdir()
    assert write_own_tokenizer(open_checkpoint(folder / "a.gguf"), folder / "own")
    return load_tokenizer(folder / "own")


def test_llama_4s_vocabulary_is_refused_by_name(tmp_path):
    path = extract(LLAMA, "llama_models/llama4/tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match="is Llama 4's vocabulary"):
        load_tokenizer(path)
