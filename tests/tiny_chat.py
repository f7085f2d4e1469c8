"""Tokenizers in the manner of published chat models, and how transformers reads them.

The pieces are those of a tiny sentencepiece model; special tokens, their flags and templates are the models' own.
"""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import generate_merges

from llama_tp.text import Message
from tests.tiny_text import make_sentencepiece_model

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate: ' + message['content']) }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
TINYLLAMA = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3_SPECIALS = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
MISTRAL_SPECIALS = ["[INST]", "[/INST]"]
TEMPLATES = {"llama2": LLAMA2, "tinyllama": TINYLLAMA, "phi3": PHI3, "mistral": MISTRAL}


def make_chat_tokenizer(folder: Path, name: str, *, legacy: bool = False) -> PreTrainedTokenizerBase:
    """Write a model's tokenizer.model and tokenizer_config.json. What transformers makes of them.

    To have its tokenizer.json, too, let it be saved with `save_pretrained`.
    """
    controls = MISTRAL_SPECIALS if name == "mistral" else []
    library = SentencePieceProcessor(model_file=str(make_sentencepiece_model(folder, control_symbols=controls)))
    vocab = {library.id_to_piece(i): i for i in range(library.vocab_size())}
    tokens = [AddedToken(piece, special=True, normalized=False) for piece in ("<unk>", "<s>", "</s>", *controls)]
    if name == "phi3":
        tokens += [AddedToken(piece, special=True, normalized=False, rstrip=True) for piece in PHI3_SPECIALS]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    merges = generate_merges(vocab, {piece: library.get_score(i) for piece, i in vocab.items()})
    oracle = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, chat_template=TEMPLATES[name], **names)
    oracle.add_tokens(tokens, special_tokens=True)
    config = {
        **names,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "chat_template": TEMPLATES[name],
        "added_tokens_decoder": {
            oracle.convert_tokens_to_ids(token.content): {
                flag: getattr(token, flag)
                for flag in ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            }
            for token in tokens
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return oracle


def ids_by_transformers(oracle: PreTrainedTokenizerBase, dialog: list[Message], **options: bool) -> list[int]:
    """apply_chat_template, ready for an answer unless it is to continue the last message."""
    return oracle.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in dialog],
        return_dict=False,
        **(options or {"add_generation_prompt": True}),
    )


def dialog_of(*contents: str, system: str | None = None) -> list[Message]:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return turns if system is None else [Message("system", system), *turns]
