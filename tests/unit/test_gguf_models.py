"""Models in GGUF files compute what transformers computes of the weights that they were made from."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader
from llama_tp.config import EngineConfig
from llama_tp.engine.startup import load_engine
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from tests.tiny_gguf import write_model
from tests.tiny_huggingface import CONFIGS, WINDOW, save, tiny_model
from tests.tiny_text import make_tokenizer_json

TOLERANCE = 1e-4  # float32, absolute
CONTEXT = 72
ALONE = Group(comm=SingleComm(), device=torch.device("cpu"), mesh=None)
READ = (
    "llama, grouped",
    "llama, tied",
    "llama, biases",
    "llama, wide heads",
    "llama, linear",
    "mistral",
    "mistral, window",
    "qwen2",
    "qwen3",
    "qwen3, biases",
)
QUANTISED = ("Q8_0", "Q4_0", "Q5_1", "BF16", "F16")


def logits_of(source, folder, tokens):
    """Of the last token, by a checkpoint that the source was converted to."""
    make_tokenizer_json(folder)
    options = {"max_seq_len": CONTEXT, "max_batch_size": 4, "model_args_path": str(folder / "out" / MODEL_ARGS)}
    convert(str(source), str(folder / "tokenizer.json"), None, str(folder / "out"), **options)
    args = ModelArgs.load_converted(folder / "out" / MODEL_ARGS)
    config = EngineConfig(max_seq_len=CONTEXT, max_batch_size=4, device="cpu")
    runner = load_engine(str(folder / "out"), args, config, ALONE).runner
    pages = tuple((0, index, index) for index in range(5))
    return runner.execute(StepPlan(1, (Chunk(0, 0, tuple(tokens), 1),), pages))[0]


def tokens_of(count, seed=1):
    return torch.randint(0, 416, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", READ)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = tiny_model(name)
    write_model(tmp_path / "a.gguf", model)
    tokens = tokens_of(CONTEXT)
    expected = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits_of(tmp_path / "a.gguf", tmp_path, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama, grouped", "qwen2", "qwen3"])
def test_transformers_reads_the_file_as_we_do(tmp_path, name):
    """That the file is what others take for GGUF, too."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if name == "qwen3":
        config.head_dim = 128  # transformers expects no other in a file
    write_model(tmp_path / "a.gguf", AutoModelForCausalLM.from_config(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")
    tokens = tokens_of(CONTEXT)
    expected = theirs(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits_of(tmp_path / "a.gguf", tmp_path, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_recovered_from_its_frequencies(tmp_path, factor):
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=416,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={**rope, "original_max_position_embeddings": 8192},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    write_model(tmp_path / "a.gguf", model, scaling={"factor": factor})
    assert GGUFReader(tmp_path / "a.gguf").args.rope_scaling == RopeScaling(factor=factor)
    tokens = tokens_of(CONTEXT)
    expected = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits_of(tmp_path / "a.gguf", tmp_path, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("settings", [{"factor": 16.0}, {"factor": 8.0, "original": 4096}, {"factor": 8.0, "high": 3}])
def test_unknown_settings_of_rope_scaling_are_refused(tmp_path, settings):
    config = LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "head_dim": 64, "rope_parameters": None, "rope_theta": 5e5})
    write_model(tmp_path / "a.gguf", AutoModelForCausalLM.from_config(config), scaling=settings)
    with pytest.raises(ValueError, match=r"a\.gguf: tensor rope_freqs\.weight is not that of Llama 3\.1, 3\.2 or 3\.3"):
        GGUFReader(tmp_path / "a.gguf")


def test_frequencies_that_change_nothing_are_no_scaling(tmp_path):
    write_model(tmp_path / "a.gguf", tiny_model("llama"), scaling={"factor": 1.0})
    assert GGUFReader(tmp_path / "a.gguf").args.rope_scaling is None


@pytest.mark.parametrize("name", READ)
def test_the_architecture_and_every_slice_are_those_of_the_same_model_in_safetensors(tmp_path, name):
    model = tiny_model(name)
    write_model(tmp_path / "a.gguf", model)
    ours, theirs = GGUFReader(tmp_path / "a.gguf"), HuggingFaceReader(save(model, tmp_path / "hf"))
    assert ours.dtype == torch.float32
    assert ours.args.to_dict() == {**theirs.args.to_dict(), "ffn_hidden_dim": ours.args.ffn_hidden_dim}
    assert ours.args.hidden_dim == theirs.args.hidden_dim
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, source in theirs.tensors.items():
        assert ours.tensors[key].shape == source.shape
        for dim, size in enumerate(source.shape):
            for start, length in ((0, size), (size // 2, size // 2), (3, 5)):
                assert torch.equal(ours.tensors[key].read(dim, start, length), source.read(dim, start, length)), key


def test_a_sliding_window_limits_the_context(tmp_path):
    write_model(tmp_path / "a.gguf", tiny_model("mistral, window"))
    args = GGUFReader(tmp_path / "a.gguf").args
    assert (args.context_limit, args.max_seq_len) == (WINDOW, WINDOW)


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_rows_are_rotated_as_they_are_dequantised(tmp_path, kind):
    model = tiny_model("qwen3")
    write_model(tmp_path / "a.gguf", model, kind=kind)
    reader = GGUFReader(tmp_path / "a.gguf", torch.float32)
    exact = HuggingFaceReader(save(model, tmp_path / "hf"))
    tolerance = {"Q8_0": 0.005, "Q4_0": 0.06, "Q5_1": 0.03, "BF16": 0.005, "F16": 0.001}[kind]
    for key, source in exact.tensors.items():
        found, expected = (tensors.read(0, 3, 20) for tensors in (reader.tensors[key], source))
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=tolerance * scale * 2, rtol=0)
    assert GGUFReader(tmp_path / "a.gguf").dtype == torch.bfloat16
