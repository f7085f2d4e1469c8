"""The demo's GGUF file converted as its publisher quantized it, against the same file widened to float32."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import llama_tp
from llama_tp.checkpoint import demo
from llama_tp.checkpoint.formats.quantized import num_bytes
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader
from llama_tp.cli.checkpoints import convert
from llama_tp.text import Message
from tests.e2e.demo_answers import ANSWER, QUESTION
from tests.paths import CONFIGS

pytestmark = pytest.mark.e2e
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(as it is, widened), both with all other weights in float32."""
    folder = tmp_path_factory.mktemp("quantized demo")
    source = str(demo.extract_gguf(folder))
    convert(source, str(folder / "quantized"), dtype="float32")
    convert(source, str(folder / "widened"), dtype="float32", quantize="none")
    return folder / "quantized", folder / "widened"


def prompts_of(checkpoint):
    """The requests of the quickstart, and the question of the demo's tests."""
    tokenizer = llama_tp.load_tokenizer(checkpoint)
    chat = llama_tp.chat_format("auto", tokenizer)
    dialog, text = (
        json.loads((CONFIGS / "requests" / name).read_text()) for name in ("dialogs.txt", "sample_text.txt")
    )
    asked = [Message(one["role"], one["content"]) for one in dialog["dialog"]]
    return [chat.encode(asked), chat.encode([Message("user", QUESTION)]), tokenizer.encode(text["prompt"])]


def greedy(checkpoint):
    config = llama_tp.EngineConfig(max_seq_len=256, max_batch_size=4, dtype="float32", device="cpu")
    args = llama_tp.ModelArgs.load(checkpoint / MODEL_ARGS)
    engine = llama_tp.load_engine(str(checkpoint), args, config, llama_tp.join("cpu"))
    params = llama_tp.SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0)
    return [completion.token_ids for completion in engine.generate(prompts_of(checkpoint), params)]


def test_all_layers_and_the_tied_head_stay_quantized(checkpoints):
    quantized, widened = map(StoredReader, checkpoints)
    assert Counter(source.form for source in quantized.quantized.values()) == {"int4": 210, "int8_groups": 1}
    assert not widened.quantized
    embedding = 4 * quantized.args.vocab_size * quantized.args.dim
    assert num_bytes(quantized) - embedding < 0.25 * (num_bytes(widened) - embedding)


def test_greedy_tokens_are_those_of_the_widened_file(checkpoints):
    quantized, widened = checkpoints
    found = greedy(quantized)
    assert found == greedy(widened)
    answer = llama_tp.load_tokenizer(quantized).decode(found[-2])
    assert answer.startswith(ANSWER)
