"""One tiny tokenizer of every kind, made once per test session."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from llama_tp.text import Tokenizer, load_tokenizer
from tests import tiny_text

MAKERS = {
    "sentencepiece": tiny_text.make_sentencepiece_model,
    "tiktoken": tiny_text.make_tiktoken_model,
    "tokenizer.json": tiny_text.make_tokenizer_json,
    "metaspace": tiny_text.make_metaspace_json,
}
KINDS = tuple(MAKERS)

quick = settings(deadline=None, max_examples=100)

# ▁ stands for a space in two of the kinds, so it does not survive them: as in Meta's own code
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@cache
def folder_of(kind: str) -> TemporaryDirectory:
    folder = TemporaryDirectory()
    MAKERS[kind](folder.name)
    return folder


def file_of(kind: str) -> Path:
    (file,) = (f for f in Path(folder_of(kind).name).iterdir() if f.name in ("tokenizer.model", "tokenizer.json"))
    return file


@cache
def tiny(kind: str) -> Tokenizer:
    return load_tokenizer(file_of(kind))


@cache
def folder_with_template(template: str, base: str = "tokenizer.json") -> TemporaryDirectory:
    """A tokenizer.json with a template; the one of the kind "tokenizer.json" has Llama 3's special tokens, too."""
    library = Library.from_file(str(file_of(base)))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    if base == "tokenizer.json":
        library.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        config |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    folder = TemporaryDirectory()
    library.save(f"{folder.name}/tokenizer.json")
    with open(f"{folder.name}/tokenizer_config.json", "w") as file:
        json.dump(config, file)
    return folder


@cache
def tokenizer_with_template(template: str, base: str = "tokenizer.json") -> Tokenizer:
    return load_tokenizer(folder_with_template(template, base).name)
