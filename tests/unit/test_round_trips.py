"""From every format into every other and back, through the served form: the same bits and the same architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from llama_tp.checkpoint.export import export
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs, RopeScaling
from tests.tiny_checkpoint import params_of, write_meta
from tests.tiny_gguf import write_model
from tests.tiny_huggingface import CONFIGS, save, tiny_model
from tests.tiny_mistral import write_mistral

SHAPE = {"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 96}
PLAIN = {
    "Llama 2": ModelArgs(**SHAPE, multiple_of=16),
    "Llama 3.1": ModelArgs(
        **SHAPE, multiple_of=8, ffn_dim_multiplier=1.3, rope_theta=5e5, rope_scaling=RopeScaling(factor=8.0)
    ),
    "Llama 3.2, tied": ModelArgs(**SHAPE, multiple_of=32, rope_theta=5e5, tied_embeddings=True),
    "Mistral": ModelArgs(**SHAPE, ffn_hidden_dim=96, rope_theta=1e6),
}
"""What Meta's own format can express. Their feed-forward, heads and vocabulary can be cut in eight."""
OTHERS = {
    "Mistral, window": ModelArgs(**{**SHAPE, "n_kv_heads": 2}, ffn_hidden_dim=96, context_limit=72, max_seq_len=72),
    "Qwen2": ModelArgs(**{**SHAPE, "n_kv_heads": 2}, ffn_hidden_dim=96, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "Qwen2, tied": ModelArgs(**{**SHAPE, "n_kv_heads": 2}, ffn_hidden_dim=96, qkv_bias=True, tied_embeddings=True),
    "Qwen3": ModelArgs(**{**SHAPE, "n_kv_heads": 2}, ffn_hidden_dim=96, attention_head_dim=16, qk_norm=True),
}
SHARDS = (1, 2, 4, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_tensors(args, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in weight_shapes(args).items()}


def stored(reader, folder):
    """What `convert` makes of it, without a tokenizer."""
    folder.mkdir()
    files = dcp.save(reader, folder)
    reader.args.save(folder / MODEL_ARGS)
    write_manifest(folder, known=files, about=reader.about)
    return folder


def computed(args):
    """The architecture, however its sizes are given, without the defaults for serving."""
    sizes = {"ffn_hidden_dim": args.hidden_dim, "attention_head_dim": args.head_dim, "multiple_of": 1}
    return replace(args, ffn_dim_multiplier=None, max_seq_len=1, max_batch_size=1, **sizes)


def assert_holds(reader, args, tensors):
    assert computed(reader.args) == computed(args)
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = reader.tensors[name].read(0, 0, tensor.shape[0])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("source", [*SHARDS, "hf"])
def test_meta_and_hugging_face_into_each_other_at_every_number_of_shards(tmp_path, name, source):
    """Meta's shards are cut by torch.chunk here, not by us."""
    args = PLAIN[name]
    tensors = random_tensors(args)
    if source == "hf":
        made = stored(MemoryReader.of(args, tensors), tmp_path / "made")
        export(made, tmp_path / "source", format="hf")
    else:
        write_meta(tmp_path / "source", tensors, source, embedding_dim=0, params=params_of(args))
    reader = open_checkpoint(tmp_path / "source")
    assert_holds(reader, args, tensors)
    served = stored(reader, tmp_path / "served")
    assert_holds(StoredReader(served), args, tensors)
    for shards in SHARDS:
        export(served, tmp_path / f"meta{shards}", format="meta", model_parallel_size=shards)
        back = open_checkpoint(tmp_path / f"meta{shards}", model_parallel_size=shards)
        assert_holds(back, args, tensors)
    export(served, tmp_path / "hf", format="hf")
    assert_holds(open_checkpoint(tmp_path / "hf"), args, tensors)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_that_are_not_metas_into_hugging_faces_format_and_back(tmp_path, name, dtype):
    args, folder = OTHERS[name], tmp_path / "0"
    tensors = random_tensors(args, DTYPES[dtype])
    folder = stored(MemoryReader.of(args, tensors), folder)
    for turn in (1, 2):
        export(folder, tmp_path / f"hf{turn}", format="hf")
        reader = open_checkpoint(tmp_path / f"hf{turn}")
        assert_holds(reader, args, tensors)
        folder = stored(reader, tmp_path / str(turn))
        assert_holds(StoredReader(folder), args, tensors)
    with pytest.raises(ValueError, match="Meta's format cannot express"):
        export(folder, tmp_path / "meta", format="meta")


FROM_TRANSFORMERS = ("llama", "llama, grouped", "llama, tied", "llama 3.1", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", FROM_TRANSFORMERS)
def test_what_transformers_saved_comes_back_as_transformers_loads_it(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = tiny_model(name)
    served = stored(open_checkpoint(save(model, tmp_path / "source")), tmp_path / "served")
    export(served, tmp_path / "hf", format="hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama, grouped", "llama, tied", "mistral", "qwen2", "qwen3"])
def test_gguf_is_the_same_model_as_hugging_faces_files_and_goes_where_they_go(tmp_path, name):
    model = tiny_model(name)
    write_model(tmp_path / "a.gguf", model)
    reader, expected = open_checkpoint(tmp_path / "a.gguf"), open_checkpoint(save(model, tmp_path / "hf"))
    tensors = {key: source.read(0, 0, source.shape[0]) for key, source in expected.tensors.items()}
    assert_holds(reader, expected.args, tensors)
    served = stored(reader, tmp_path / "served")
    export(served, tmp_path / "out", format="hf")
    assert_holds(open_checkpoint(tmp_path / "out"), expected.args, tensors)
    if not name.startswith("qwen"):
        export(served, tmp_path / "meta", format="meta", model_parallel_size=2)
        assert_holds(open_checkpoint(tmp_path / "meta"), expected.args, tensors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_of_llama_3_with_its_scaled_rotation(tmp_path, factor, monkeypatch):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": factor == 32.0}
    rope["original_max_position_embeddings"] = 8192
    monkeypatch.setitem(CONFIGS, "3.x", lambda: LlamaConfig(**sizes, **heads, rope_parameters=rope))
    model = tiny_model("3.x")
    write_model(tmp_path / "a.gguf", model, scaling={"factor": factor})
    expected = open_checkpoint(save(model, tmp_path / "hf"))
    tensors = {key: source.read(0, 0, source.shape[0]) for key, source in expected.tensors.items()}
    served = stored(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "served")
    export(served, tmp_path / "out", format="hf")
    assert_holds(open_checkpoint(tmp_path / "out"), expected.args, tensors)


def test_mistral_ais_own_format_goes_where_hugging_faces_goes(tmp_path):
    model = tiny_model("mistral")
    expected = open_checkpoint(save(model, tmp_path / "hf"))
    tensors = {key: source.read(0, 0, source.shape[0]) for key, source in expected.tensors.items()}
    served = stored(open_checkpoint(write_mistral(tmp_path / "mistral", model)), tmp_path / "served")
    for format, shards in (("hf", None), ("meta", 1), ("meta", 2)):
        folder = tmp_path / f"{format}{shards}"
        export(served, folder, format=format, model_parallel_size=shards)
        assert_holds(open_checkpoint(folder), expected.args, tensors)
