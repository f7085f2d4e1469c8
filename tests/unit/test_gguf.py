"""GGUF weights and tokenizer are read exactly, and hostile headers are refused."""

from __future__ import annotations

import json
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.gguf_tokenizer import write_tokenizer
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.model_args import ModelArgs
from tests.tiny_checkpoint import params_of, write_meta
from tests.tiny_gguf import (
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    META_TO_GGUF,
    VOCAB,
    tokens_and_merges,
    write_gguf,
)


def test_a_gguf_file_is_converted_to_what_the_same_weights_in_metas_shards_are(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    meta = tmp_path / "meta"
    tensors = {name: source.read(0, 0, source.shape[0]) for name, source in reader.tensors.items()}
    write_meta(meta, tensors, 2, embedding_dim=0, params=params_of(reader.args))
    write_tokenizer(reader.metadata, meta)
    for source, name in ((tmp_path / "a.gguf", "gguf"), (meta, "fairscale")):
        convert(str(source), str(meta), None, str(tmp_path / name), model_args_path=str(tmp_path / name / MODEL_ARGS))
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("gguf", "fairscale")
    )
    assert json.loads(ours.pop("manifest.json"))["about"] == {
        "source": "gguf",
        "widened_tensors": 6,
        "dtype": "bfloat16",
    }
    del theirs["manifest.json"]
    assert ours == theirs
    assert any(name.endswith(".distcp") for name in ours)


def test_a_number_of_shards_is_refused_for_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"model_parallel_size=2, but .*a\.gguf is one GGUF file; leave it out"):
        open_checkpoint(tmp_path / "a.gguf", model_parallel_size=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_slice_of_every_tensor_is_dequantised_as_the_format_says(tmp_path, dtype):
    expected = write_gguf(tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf", dtype)
    assert reader.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        source = reader.tensors[name]
        assert source.shape == tuple(tensor.shape)
        for dim, size in enumerate(tensor.shape):
            for start, length in ((0, size), (size // 2, size // 2), (3, 5)):
                found = source.read(dim, start, length)
                assert found.dtype == source.dtype == dtype
                assert torch.equal(found, tensor.narrow(dim, start, length).to(dtype)), (name, dim, start)


def test_the_architecture_comes_from_the_metadata(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    assert GGUFReader(tmp_path / "a.gguf").args == ModelArgs(
        dim=DIM,
        n_layers=1,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        vocab_size=VOCAB,
        norm_eps=1e-5,
        rope_theta=100000.0,
        tied_embeddings=True,
    )


def test_a_hidden_size_that_metas_rule_does_not_give_is_kept(tmp_path):
    extra = {
        meta: (name, tuple(160 if size == HIDDEN else size for size in shape), kind)
        for meta, (name, shape, kind) in META_TO_GGUF.items()
        if "feed_forward" in meta
    }
    write_gguf(tmp_path / "a.gguf", hidden=160, extra=extra)
    assert GGUFReader(tmp_path / "a.gguf").args.hidden_dim == 160


def test_an_untied_output_is_found(tmp_path):
    extra = {"output": ("output", (VOCAB, DIM), gguf.GGMLQuantizationType.Q8_0)}
    write_gguf(tmp_path / "a.gguf", extra=extra)
    reader = GGUFReader(tmp_path / "a.gguf")
    assert not reader.args.tied_embeddings
    assert reader.tensors["output.weight"].shape == (VOCAB, DIM)


F32 = gguf.GGMLQuantizationType.F32
REFUSED = {
    "another architecture": (
        {"architecture": "gemma2"},
        "architecture 'gemma2', which is not supported; supported: llama, qwen2, qwen3",
    ),
    "qwen2 without biases": ({"architecture": "qwen2"}, "layers.0.attention.wk.bias is missing"),
    "qwen3 without norms": ({"architecture": "qwen3"}, "layers.0.attention.k_norm.weight is missing"),
    "a missing tensor": ({"drop": ("layers.0.attention.wk",)}, "layers.0.attention.wk.weight is missing"),
    "a mixture of experts": (
        {"extra": {"x": ("blk.0.ffn_gate_inp", (4, DIM), F32)}},
        "blk.0.ffn_gate_inp.weight is unexpected",
    ),
    "one bias of three": ({"extra": {"x": ("blk.0.attn_q.bias", (DIM,), F32)}}, "attention.wk.bias is missing"),
    "norms in a llama": ({"extra": {"x": ("blk.0.attn_q_norm", (16,), F32)}}, "attention.q_norm.weight is unexpected"),
    "another shape": ({"hidden": 512}, "expected (512, 64) from the metadata"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
    "linear by nothing": ({"llama__rope__scaling__factor": "two"}, "llama.rope.scaling.factor='two' must be a number"),
    "negative factor": ({"llama__rope__scaling__factor": -2.0}, "llama.rope.scaling.factor=-2.0 must be"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count=8: a mixture of experts"),
    "partial rotation": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count=8, expected the head size"),
    "other values than keys": ({"llama__attention__value_length": 8}, "llama.attention.value_length=8, expected"),
    "no heads": ({"heads": 0}, "llama.attention.head_count=0 must be a positive integer"),
    "heads that do not divide": ({"heads": 3}, "llama.embedding_length=64 must be a multiple of"),
    "too many layers": ({"layers": 1 << 30}, "llama.block_count=1073741824 must be at most 10000"),
    "unknown frequencies": ({"extra": {"x": ("rope_freqs", (8,), F32)}}, "tensor rope_freqs.weight is not that of"),
    "quantised frequencies": (
        {"extra": {"x": ("rope_freqs", (32,), gguf.GGMLQuantizationType.Q8_0)}},
        "tensor rope_freqs.weight is not that of",
    ),
    "a type beyond the package": (
        {"raw": ("blk.0.attn_q.bias", np.zeros(4, np.int32))},
        "tensor blk.0.attn_q.bias is of type I32, which the gguf package cannot dequantise",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_not_computed_is_refused_by_name(tmp_path, case):
    arguments, words = REFUSED[case]
    write_gguf(tmp_path / "a.gguf", **arguments)
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        GGUFReader(tmp_path / "a.gguf")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def _key(name, kind, payload):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + payload


def _header(*parts, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(parts)) + b"".join(parts)


HOSTILE = {
    "empty": b"",
    "another file": b"PK\3\4" + bytes(100),
    "version 9": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "2**60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "2**60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "an array of 2**60 bytes": _header(_key(b"a", 9, struct.pack("<IQ", 0, 1 << 60))),
    "an array of 2**40 strings": _header(_key(b"a", 9, struct.pack("<IQ", 8, 1 << 40))),
    "10 million elements that are there": _header(_key(b"a", 9, struct.pack("<IQ", 0, 10_000_000) + bytes(10_000_000))),
    "an array of arrays": _header(_key(b"a", 9, struct.pack("<IQ", 9, 1 << 20) + bytes(64))),
    "a string of 2**63 bytes": _header(_key(b"a", 8, struct.pack("<Q", 1 << 63))),
    "an unknown type": _header(_key(b"a", 77, bytes(8))),
    "a tensor of 2**31 dims": _header(tensors=1) + struct.pack("<Q1sI", 1, b"a", 1 << 31),
    "a tensor beyond the end": _header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 1 << 40, 0, 0),
    "a tensor of an unknown type": _header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 1, 999, 0),
    "a key twice": _header(_key(b"a", 0, b"1"), _key(b"a", 0, b"1")),
    "no metadata": _header() + bytes(64),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path, case):
    path = tmp_path / "a.gguf"
    path.write_bytes(HOSTILE[case])
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        GGUFReader(path)
    assert "\n" not in str(error.value)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_a_truncated_file_is_refused(tmp_path, size):
    write_gguf(tmp_path / "a.gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a sound GGUF file"):
        GGUFReader(path)


def test_the_tokenizer_splits_digits_merges_and_keeps_control_tokens_whole(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    write_tokenizer(GGUFReader(tmp_path / "a.gguf").metadata, tmp_path)
    tokens, _ = tokens_and_merges()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCAB

    def pieces(text):
        return [tokens[i] for i in tokenizer(text)["input_ids"]]

    assert pieces("hello world") == ["hello", "Ġwor", "l", "d"]
    # "1 2" is a merge of the vocabulary, but each digit is a word of its own.
    assert pieces("12") == ["1", "2"]
    assert pieces("é") == ["Ã", "©"]
    assert pieces("<|im_start|>hello<|im_end|>") == ["<|im_start|>", "hello", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = "hello wörld, 123 times\n\t🐋"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is False


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", pre="deepseek-r1-qwen")
    with pytest.raises(ValueError, match="'deepseek-r1-qwen'"):
        write_tokenizer(GGUFReader(tmp_path / "a.gguf").metadata, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
