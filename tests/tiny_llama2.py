"""A tiny Llama 2 in Meta's files that knows its text by heart, so that what it serves can be held to the letter.

Its own sentencepiece model, several fairscale shards, params.json with a vocab_size of -1, untied output. It is trained
in seconds, with transformers' LlamaForCausalLM as the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_tp.model_args import ModelArgs
from llama_tp.text import Message, Tokenizer, chat_format, load_tokenizer
from tests.tiny_checkpoint import params_of, write_meta
from tests.tiny_text import make_sentencepiece_model

PASSAGE = (
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world "
    "🐋. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; "
    "whenever I stop, blasé, before coffin warehouses, then I account it high time to get to 海 as soon as I can. 🌊"
)
"""After the beginning of Moby-Dick (1851). é and — are in the vocabulary; 🐋, 海 and 🌊 are spelled in bytes."""

DIALOG = [{"role": "user", "content": "Where is the white whale?"}]
ANSWER = "Far out at sea—near 日本, they say. 🐋 Déjà vu!"

LONG_DIALOG = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Ishmael."},
    {"role": "user", "content": "And the captain?"},
]
LONG_ANSWER = "Ahab, of the Pequod."

ENDLESS = "tick tock tick tock"
"""The model goes on with " tick tock" for ever: a generation that lasts as long as a test needs it to."""

MIN_MARGIN = 4.0
"""The logit of every token that is to be recited is at least this much above that of any other token."""

_SPELLED_IN_BYTES = "🐋海🌊日本"
_OUTPUT_ROWS_MULTIPLE = 16  # Llama 2 splits the output over its shards by rows
_IGNORED = -100


def passage_prompt(num_words: int) -> str:
    """The first words of PASSAGE; asked with it, the model recites the rest."""
    return " ".join(PASSAGE.split(" ")[:num_words])


PASSAGE_REQUEST = {"prompt": passage_prompt(3), "max_new_tokens": 300, "temperature": 0}
REST_OF_PASSAGE = PASSAGE.removeprefix(passage_prompt(3))
"""Its answer."""

LONG_REQUEST = {"prompt": ENDLESS, "max_new_tokens": 4000, "temperature": 0, "stream": True}
"""Streams for a second or more."""

VERY_LONG_REQUEST = {**LONG_REQUEST, "max_new_tokens": 16_000}
"""Streams until its client leaves, however fast the machine is. What comes after LONG_REQUEST's tokens may be wrong."""
VERY_LONG_SEQ_LEN = 16_384
"""The context that it needs."""


def make_tiny_llama2(folder: Path, *, model_parallel_size: int = 2) -> Path:
    """Train the model and write it to the folder, as Meta ships Llama 2. A few seconds. The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(_make_tokenizer(folder))
    assert tokenizer.vocab_size % model_parallel_size == 0, "vocab_size of the sentencepiece model was chosen to divide"
    args = ModelArgs(dim=96, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=32)
    lessons = _lessons(tokenizer)
    weights = _meta_weights(_train(args, lessons), args)
    params = ModelArgs.from_params({**args.to_dict(), "vocab_size": -1})
    return write_meta(folder, weights, model_parallel_size, params=params_of(params))


def _make_tokenizer(folder: Path) -> Path:
    text = " ".join([PASSAGE, ANSWER, LONG_ANSWER, *(turn["content"] for turn in DIALOG + LONG_DIALOG)])
    corpus = [text.translate(dict.fromkeys(map(ord, _SPELLED_IN_BYTES))), ENDLESS, "[INST] <<SYS>>\n<</SYS>> [/INST]"]
    return make_sentencepiece_model(folder, corpus, vocab_size=432)


def _lessons(tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """(ids, how many of them are given and not learnt)."""
    passage = tokenizer.encode(PASSAGE, bos=True, eos=True)
    endless = tokenizer.encode(" ".join([ENDLESS] * (len(passage) // 4)), bos=True)
    lessons = [(passage, len(tokenizer.encode(passage_prompt(1), bos=True))), (endless[: len(passage)], 2)]
    for dialog, answer in ((DIALOG, ANSWER), (LONG_DIALOG, LONG_ANSWER)):
        prompt = chat_format("llama2", tokenizer).encode([Message(**turn) for turn in dialog])
        lessons.append((prompt + tokenizer.encode(answer, eos=True), len(prompt)))
    return lessons


def _train(args: ModelArgs, lessons: Sequence[tuple[list[int], int]], *, steps: int = 2000) -> LlamaForCausalLM:
    """Until every lesson is known with a margin. AssertionError if that takes too many steps.

    On one thread: two that wait for each other take a minute on two cores that others use, too.
    """
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    ids, targets = _pad(lessons)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train_on_this_thread(config, ids, targets, steps)
    finally:
        torch.set_num_threads(threads)


def _train_on_this_thread(config: LlamaConfig, ids: Tensor, targets: Tensor, steps: int) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
        for _ in range(steps):
            logits = model(ids).logits[:, :-1]
            if _margin(logits.detach(), targets) > MIN_MARGIN:
                return model.eval().requires_grad_(False)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    raise AssertionError(f"the tiny Llama 2 has not learnt its passage in {steps} steps")


def _pad(lessons: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """(ids, targets): (B, T) and (B, T - 1), where a target of _IGNORED is not learnt."""
    width = max(len(ids) for ids, _ in lessons)
    ids = torch.zeros(len(lessons), width, dtype=torch.long)
    targets = torch.full((len(lessons), width), _IGNORED)
    for row, (lesson, given) in enumerate(lessons):
        ids[row, : len(lesson)] = torch.tensor(lesson)
        targets[row, given : len(lesson)] = ids[row, given : len(lesson)]
    return ids, targets[:, 1:]


def _margin(logits: Tensor, targets: Tensor) -> float:
    """How far the least certain target is above the best of the other tokens."""
    learnt = targets != _IGNORED
    logits, targets = logits[learnt], targets[learnt].unsqueeze(-1)  # (N, V), (N, 1)
    right = logits.gather(-1, targets).squeeze(-1)
    wrong = logits.scatter(-1, targets, float("-inf")).amax(-1)
    return (right - wrong).min().item()


def _meta_weights(model: LlamaForCausalLM, args: ModelArgs) -> dict[str, Tensor]:
    """In Meta's names and rotary layout: neighbouring pairs of every rotated head instead of halves."""

    def unpermute(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()

    block: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "attention.wq": ("self_attn.q_proj", unpermute),
        "attention.wk": ("self_attn.k_proj", unpermute),
        "attention.wv": ("self_attn.v_proj", torch.clone),
        "attention.wo": ("self_attn.o_proj", torch.clone),
        "feed_forward.w1": ("mlp.gate_proj", torch.clone),
        "feed_forward.w2": ("mlp.down_proj", torch.clone),
        "feed_forward.w3": ("mlp.up_proj", torch.clone),
        "attention_norm": ("input_layernorm", torch.clone),
        "ffn_norm": ("post_attention_layernorm", torch.clone),
    }
    theirs = model.state_dict()
    weights = {
        "tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for layer in range(args.n_layers):
        for name, (source, change) in block.items():
            weights[f"layers.{layer}.{name}.weight"] = change(theirs[f"model.layers.{layer}.{source}.weight"])
    return weights
