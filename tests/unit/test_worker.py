"""A rank and its model's tokenizer: it fits the weights, and the log names the chat format."""

from __future__ import annotations

import json
import logging

import pytest

from llama_tp.checkpoint.convert import convert
from llama_tp.text.tokenizer_files import copy_tokenizer
from llama_tp.torchserve.worker import load_rank
from tests import tiny_text
from tests.tiny_checkpoint import ARGS, meta_tensors, write_meta

PAD = {"content": "<pad>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model folder with a checkpoint and no tokenizer yet."""
    folder = tmp_path_factory.mktemp("model")
    write_meta(folder / "originals", meta_tensors(), 1)
    words = tiny_text.make_sentencepiece_model(folder / "originals")
    args = folder / "model_args.json"
    convert(str(folder / "originals"), str(words), 1, str(folder / "converted"), 128, 4, str(args))
    return folder


@pytest.fixture
def load(converted, tmp_path, monkeypatch, caplog):
    """Load the rank of a plain process with a tokenizer made by a function. The chat format, and the log."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def with_tokenizer(make, **handler):
        copy_tokenizer(make(tmp_path), converted)
        (path,) = (converted / name for name in ("tokenizer.json", "tokenizer.model") if (tmp_path / name).exists())
        paths = {"converted_ckpt_dir": "converted", "tokenizer_path": path.name}
        config = {
            "deviceType": "cpu",
            "parallelType": "tp",
            "continuousBatching": True,
            "torchrun": {"nproc-per-node": 1, "rdzv-endpoint": "localhost:0"},
            "handler": {"max_new_tokens": 8, "kv_cache_memory": "64MiB", **paths, **handler},
        }
        with caplog.at_level(logging.INFO):
            return load_rank(lambda: config, converted, lead=True)

    yield with_tokenizer
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (converted / name).unlink(missing_ok=True)


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("chat format: ")]


def with_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return tiny_text.make_sentencepiece_model(folder)


@pytest.mark.parametrize(
    ("make", "handler", "line"),
    [
        (tiny_text.make_tokenizer_json, {}, "jinja (the chat_template in tokenizer_config.json)"),
        (with_template, {}, "jinja (the chat_template in chat_template.jinja)"),
        (with_template, {"chat_format": "llama2"}, "llama2 (as configured)"),
        (
            tiny_text.make_sentencepiece_model,
            {},
            "llama2 (the vocabulary is a sentencepiece model, and there is no chat template next to the tokenizer)",
        ),
    ],
)
def test_the_log_names_the_chat_format_and_where_it_is_from(load, caplog, make, handler, line):
    load(make, **handler)
    assert logged(caplog) == [f"chat format: {line}"]


def test_the_log_says_why_a_model_cannot_chat(load, caplog):
    load(tiny_text.make_metaspace_json)
    (line,) = logged(caplog)
    assert line.startswith("chat format: none: chat_format='auto' finds no chat format for this tokenizer.json")


def with_pad_beyond(folder):
    path = tiny_text.make_tokenizer_json(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = max(json.loads(path.read_text())["model"]["vocab"].values()) + 1
    fillers = {i: {**PAD, "content": f"<|filler {i}|>"} for i in range(size + 2, ARGS.vocab_size)}
    config["added_tokens_decoder"] = {**fillers, ARGS.vocab_size: PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_token_beyond_the_embedding_is_served_as_the_text_it_is(load):
    tokenizer = load(with_pad_beyond).tokenizer
    assert tokenizer.beyond_embedding == {"<pad>": ARGS.vocab_size}
    assert tokenizer.decode(tokenizer.encode("a<pad>")) == "a<pad>"
    assert max(tokenizer.encode("a<pad>")) < ARGS.vocab_size == tokenizer.vocab_size


def test_a_vocabulary_larger_than_the_embedding_is_refused_by_the_name_of_its_key(load):
    def larger(folder):
        return tiny_text.make_tokenizer_json(
            folder, [*tiny_text.CORPUS, "".join(map(chr, range(0x100, 0x200)))] * 9, vocab_size=900
        )

    with pytest.raises(RuntimeError, match=r"handler\.tokenizer_path: .*tokenizer\.json has \d+ tokens .*512 rows"):
        load(larger)


def test_the_leader_reads_the_key_and_a_file_without_one_is_named(load, converted):
    def sentencepiece(folder):
        return tiny_text.make_sentencepiece_model(folder)

    assert load(sentencepiece).access is None
    (converted / "key").write_text("k\n")
    load(sentencepiece, api_key_file="key").access.check("k", "v1/models")
    (converted / "key").write_text("\n")
    with pytest.raises(RuntimeError, match=r"handler\.api_key_file=.*: the key is empty"):
        load(sentencepiece, api_key_file="key")
    with pytest.raises(RuntimeError, match=r"handler\.api_key_file=.*nowhere.* cannot be read: No such file"):
        load(sentencepiece, api_key_file="nowhere")
