"""Makers of tiny tokenizer files of every kind, for tests that need one and have no hub."""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Once upon a time there was a tensor that lived on two ranks at once.",
    "In 1969 people walked on the moon; it took 3 days, 4 hours and 12 minutes.",
    "def add(a, b):\n    return a + b  # naïve, but déjà vu\n",
    "user assistant system [INST] <<SYS>> [/INST] <</SYS>>",
)

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_sentencepiece_model(
    folder: str | Path,
    corpus: Iterable[str] = CORPUS,
    *,
    vocab_size: int = 400,
    **options: object,
) -> Path:
    """tokenizer.model as Llama 2 has it: BPE, byte fallback, split digits, a dummy space in front of a text.

    In Llama 2's order, too: the first piece behind the bytes is a run of two spaces, then come those of words. Other
    options are those of sentencepiece's trainer.
    """
    lines = [line for text in corpus for line in text.splitlines()] * 4
    commonest = max(Counter(word[0] for line in lines for word in line.split()).values())
    lines += [" " * 3] * (1 + commonest // 2)  # a run of four with the space in front: ▁▁ is twice in it, ▁▁▁▁ once
    model = io.BytesIO()
    as_llama2 = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**as_llama2, **options}
    )
    path = Path(folder) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def make_tokenizer_json(folder: str | Path, corpus: Iterable[str] = CORPUS, *, vocab_size: int = 400) -> Path:
    """tokenizer.json and tokenizer_config.json as SmolLM2 has them: byte-level BPE, ChatML tokens, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus] * 4, trainer)
    # as some fine-tunes have it: a control token that is not declared special, and one that really is text
    tokenizer.add_tokens([AddedToken("<|tool|>", normalized=False), AddedToken("<think>", normalized=False)])
    config = {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": CHATML_TEMPLATE,
    }
    return _save(tokenizer, folder, config)


def make_metaspace_json(folder: str | Path, corpus: Iterable[str] = CORPUS, *, vocab_size: int = 400) -> Path:
    """tokenizer.json and tokenizer_config.json as Llama 2 has them in transformers' form: ▁ and <0x0A>."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = [word for text in corpus for word in text.split()] * 4
    tokenizer.train_from_iterator([*words, *[" " * 3] * len(words)], trainer)  # ▁▁ comes first, as in Llama 2
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] in specials]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return _save(Tokenizer.from_str(json.dumps(definition)), folder, {"bos_token": "<s>", "eos_token": "</s>"})


def make_tiktoken_model(folder: str | Path) -> Path:
    """tokenizer.model as Llama 3 has it: 256 bytes and some merges, one base64 token and its rank in a line."""
    merges = [b"he", b"th", b"the", b" the", b"in", b"ing", b"an", b"and", b" and", b"\n\n", b"  ", b"user", b"12"]
    merges += ["é".encode(), "日".encode()[:2]]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    path = Path(folder) / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def _save(tokenizer: Tokenizer, folder: str | Path, config: dict) -> Path:
    path = Path(folder) / "tokenizer.json"
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return path
