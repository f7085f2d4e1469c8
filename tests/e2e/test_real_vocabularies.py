"""Published vocabularies: Mistral's, which has Llama 2's form and order, and Meta's for Llama 3 and 4."""

from __future__ import annotations

import random

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from tiktoken.load import load_tiktoken_bpe

from llama_tp.text import Detokenizer, Tokenizer, chat_format, load_tokenizer
from tests.real_vocabularies import LLAMA, MISTRAL, extract

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
    return [*WORDS, *("".join(rng.choices(WORDS, k=rng.randrange(1, 8))) for _ in range(300))]


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def both(request, tmp_path_factory) -> tuple[Tokenizer, SentencePieceProcessor]:
    member = f"mistral_common/data/{SENTENCEPIECE[request.param]}"
    path = extract(MISTRAL, member, tmp_path_factory.mktemp(request.param))
    return load_tokenizer(path), SentencePieceProcessor(model_file=str(path))


def test_texts_are_encoded_and_decoded_as_sentencepiece_does(both):
    tokenizer, library = both
    for text in some_texts():
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_any_pieces_are_decoded_as_sentencepiece_does(both):
    tokenizer, library = both
    rng = random.Random(1)
    pieces = [i for i in range(library.vocab_size()) if not (library.is_byte(i) or library.is_unknown(i))]
    for _ in range(2000):
        ids = rng.choices(pieces, k=rng.randrange(1, 6))
        assert tokenizer.decode(ids) == library.decode(ids), ids


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


def test_llama_3s_ids_are_metas(tmp_path):
    path = extract(LLAMA, "llama_models/llama3/tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(path, embedding_rows=128256)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )  # as published with the file
    ranks = load_tiktoken_bpe(str(path))
    meta = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in some_texts():
        assert tokenizer.encode(text) == meta.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_ids["<|eot_id|>"] == 128009
    assert chat_format("auto", tokenizer).name == "llama3"


def test_llama_4s_vocabulary_is_refused_by_name(tmp_path):
    path = extract(LLAMA, "llama_models/llama4/tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match="is Llama 4's vocabulary"):
        load_tokenizer(path)
