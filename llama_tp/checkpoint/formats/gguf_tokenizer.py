"""The tokenizer inside a GGUF file, written as the files that a tokenizer is usually published in.

Byte-level BPE ("gpt2") becomes tokenizer.json, SentencePiece's BPE ("llama") tokenizer.model. The chat template, BOS
and EOS go into tokenizer_config.json, what else ends a turn into generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.gguf_metadata import Metadata
from llama_tp.checkpoint.formats.gguf_sentencepiece import sentencepiece_model

_CONTROL, _USER_DEFINED = 3, 4
_REMEDY = "pass the model's tokenizer.json or tokenizer.model with --tokenizer"

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py, as in its tokenizer.json."""
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
"""https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/tokenization_qwen2.py."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Mistral's tekken.json, in https://pypi.org/project/mistral-common/."""


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """A rule that GGUF names: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp."""

    words: str | None
    """A pattern of words; None for GPT-2's own."""
    ignores_merges: bool = False
    """Whether a word that is a token is taken as it is."""
    adds_bos: bool = False
    """Whether a prompt begins with BOS, where the file does not say so."""
    splits_digits: bool = False
    """Whether each digit is a word."""
    is_nfc: bool = False
    """Whether text is normalized to NFC before."""


_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(None),
    "smollm": _PreTokenizer(None, splits_digits=True),
    "llama-bpe": _PreTokenizer(_LLAMA_3, ignores_merges=True, adds_bos=True),
    "smaug-bpe": _PreTokenizer(_LLAMA_3),
    "qwen2": _PreTokenizer(_QWEN_2, is_nfc=True),
    "tekken": _PreTokenizer(_TEKKEN, ignores_merges=True, adds_bos=True),
}


def write_tokenizer(metadata: Metadata, folder: str | Path) -> None:
    """Write the tokenizer of a GGUF file into a folder. ValueError for a kind or pre-tokenizer that is not read, and
    for one that is not sound."""
    folder, kind = Path(folder), metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        found = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}, 'gpt2' and 'llama' are read"
        raise ValueError(f"{metadata.path} has {found}; {_REMEDY}")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    types = metadata.numbers("tokenizer.ggml.token_type")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{metadata.path}: {len(tokens)} tokens ({len(set(tokens))} distinct) with {len(types)} types; {_REMEDY}"
        )
    if kind == "gpt2":
        pre = _declared_pre_tokenizer(metadata)
        _byte_level_bpe(metadata, pre, tokens, types).save(str(folder / "tokenizer.json"))
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": pre.adds_bos}
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(metadata, tokens, types))
        defaults = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    _write_siblings(metadata, tokens, folder, defaults)


def _declared_pre_tokenizer(metadata: Metadata) -> _PreTokenizer:
    """llama.cpp's "default", which is also that of files without a name, is no published tokenizer's."""
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{metadata.path}: tokenizer.ggml.pre={name!r} is not read; read: {', '.join(_PRE_TOKENIZERS)}; {_REMEDY}"
        )
    return _PRE_TOKENIZERS[name]


def _byte_level_bpe(metadata: Metadata, pre: _PreTokenizer, tokens: list[str], types: list[float]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [_pair(metadata, vocab, merge) for merge in metadata.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignores_merges))
    if pre.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _as_in_tokenizer_json(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in added if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in added if k == _USER_DEFINED])
    return tokenizer


def _as_in_tokenizer_json(pre: _PreTokenizer) -> Any:
    """The rule as published tokenizer.json files have it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    byte_level = ByteLevel(add_prefix_space=False, use_regex=pre.words is None)
    if pre.words is not None:
        return Sequence([Split(Regex(pre.words), behavior="isolated"), byte_level])
    return Sequence([Digits(individual_digits=True), byte_level]) if pre.splits_digits else byte_level


def _pair(metadata: Metadata, vocab: Mapping[str, int], merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    if not (first in vocab and second in vocab and first + second in vocab):
        raise ValueError(f"{metadata.path}: {merge!r} is not a merge of two tokens; {_REMEDY}")
    return first, second


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[float]) -> bytes:
    scores = metadata.numbers("tokenizer.ggml.scores")
    bos, eos = _token(metadata, tokens, "bos"), _token(metadata, tokens, "eos")
    try:
        return sentencepiece_model(
            tokens,
            scores,
            types,
            bos=bos,
            eos=eos,
            adds_space=metadata.flag("tokenizer.ggml.add_space_prefix", True),
            merges_spaces=metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False),
        )
    except ValueError as error:
        raise ValueError(f"{metadata.path}: {error}; {_REMEDY}") from None


def _write_siblings(metadata: Metadata, tokens: list[str], folder: Path, defaults: dict[str, Any]) -> None:
    config = {
        "tokenizer_class": defaults["tokenizer_class"],
        "bos_token": _token(metadata, tokens, "bos"),
        "eos_token": _token(metadata, tokens, "eos"),
        "add_bos_token": metadata.flag("tokenizer.ggml.add_bos_token", defaults["add_bos_token"]),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    if not isinstance(template := config["chat_template"], str | None):
        raise ValueError(f"{metadata.path}: tokenizer.chat_template={template!r:.80} must be a string; {_REMEDY}")
    _write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    ends = [_token_id(metadata, tokens, role) for role in ("eos", "eot", "eom")]
    stops = sorted({index for index in ends if index is not None})
    if len(stops) > 1:
        _write_json(folder / "generation_config.json", {"eos_token_id": stops})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token(metadata: Metadata, tokens: list[str], role: str) -> str | None:
    index = _token_id(metadata, tokens, role)
    return None if index is None else tokens[index]


def _token_id(metadata: Metadata, tokens: list[str], role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    if metadata.get(key) is None:
        return None
    if (index := metadata.integer(key)) >= len(tokens):
        raise ValueError(f"{metadata.path}: {key}={index}, but there are {len(tokens)} tokens")
    return index
