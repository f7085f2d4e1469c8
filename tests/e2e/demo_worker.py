"""One rank that generates greedily from the demo, through the public API. Usage: ... CHECKPOINT TOKENIZER OUT_FILE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_tp
from llama_tp.text import Message
from tests.distributed.torchrun import exit_rank
from tests.e2e.demo_answers import QUESTION

PROMPTS = ["Once upon a time", "The capital of France is", "def fibonacci(n):", "Water boils at"]


def main() -> None:
    checkpoint, tokenizer_path, out = sys.argv[1:]
    tokenizer = llama_tp.load_tokenizer(tokenizer_path)
    group = llama_tp.join("cpu")
    config = llama_tp.EngineConfig(max_seq_len=256, dtype="float32", device="cpu")
    args = llama_tp.ModelArgs.load(Path(checkpoint, "model_args.json"))
    engine = llama_tp.load_engine(checkpoint, args, config, group)
    chat = llama_tp.chat_format("auto", tokenizer)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS] + [chat.encode([Message("user", QUESTION)])]
    completions = engine.generate(prompts, llama_tp.SamplingParams(max_new_tokens=48, temperature=0))
    if engine.is_leader:
        Path(out).write_text(json.dumps([[p, c.token_ids] for p, c in zip(prompts, completions, strict=True)]))
    exit_rank(group)


if __name__ == "__main__":
    main()
