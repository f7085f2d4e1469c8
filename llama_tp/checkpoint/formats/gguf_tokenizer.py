"""The tokenizer inside a GGUF file, written as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.formats.gguf import GGUFReader

_CONTROL = 3


def write_tokenizer(reader: GGUFReader, folder: str | Path) -> None:
    """Write the byte-level BPE of a GGUF file. ValueError for another kind of tokenizer or pre-tokenizer.

    Control tokens become special tokens; the chat template, and whether a BOS is prepended, go into
    tokenizer_config.json.
    """
    model, pre = reader.metadata.get("tokenizer.ggml.model"), reader.metadata.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise ValueError(
            f"{reader.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; only 'gpt2' with 'smollm' is read"
        )
    tokens: list[str] = reader.metadata.get("tokenizer.ggml.tokens")
    kinds: list[int] = reader.metadata.get("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{reader.path}: {len(tokens)} tokens ({len(set(tokens))} distinct) with {len(kinds)} types")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    merges = [_pair(reader, merge) for merge in reader.metadata.get("tokenizer.ggml.merges")]
    tokenizer = _byte_level_bpe({token: index for index, token in enumerate(tokens)}, merges, special)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _token(reader, tokens, "bos"),
        "eos_token": _token(reader, tokens, "eos"),
        "add_bos_token": bool(reader.metadata.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": reader.metadata.get("tokenizer.chat_template"),
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2, ensure_ascii=False)
    (Path(folder) / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # SmolLM: each digit is a word of its own, then GPT-2's rule.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _pair(reader: GGUFReader, merge: str) -> tuple[str, str]:
    first, separator, second = merge.partition(" ")
    if not separator:
        raise ValueError(f"{reader.path}: {merge!r} is not a merge of two tokens")
    return first, second


def _token(reader: GGUFReader, tokens: list[str], role: str) -> str | None:
    index = reader.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is not None and index >= len(tokens):
        raise ValueError(f"{reader.path}: tokenizer.ggml.{role}_token_id={index}, but there are {len(tokens)} tokens")
    return None if index is None else tokens[index]
