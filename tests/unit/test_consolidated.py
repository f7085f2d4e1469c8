"""Models as Mistral AI publishes them compute what transformers computes; other settings are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.consolidated import ConsolidatedReader
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.config import EngineConfig
from llama_tp.engine.startup import load_engine
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from llama_tp.text import load_tokenizer
from tests.tiny_checkpoint import PARAMS, meta_tensors, write_meta
from tests.tiny_huggingface import CONFIGS, WINDOW, save, tiny_model
from tests.tiny_mistral import mistral_tensors, write_mistral, write_params
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json

TOLERANCE = 1e-4  # float32, absolute
ALONE = Group(comm=SingleComm(), device=torch.device("cpu"), mesh=None)
NAMES = ("mistral", "mistral, wide heads", "mistral, tied")


@pytest.fixture(autouse=True)
def more_models(monkeypatch):
    sizes = {key: value for key, value in CONFIGS["mistral"]().to_dict().items() if key != "head_dim"}
    for name, changes in (("mistral, wide heads", {"head_dim": 24}), ("mistral, tied", {"tie_word_embeddings": True})):
        monkeypatch.setitem(CONFIGS, name, lambda changes=changes: MistralConfig(**{**sizes, **changes}))


def converted(source, folder, **options):
    convert(str(source), None, None, str(folder), model_args_path=str(folder / MODEL_ARGS), **options)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = tiny_model(name)
    source = write_mistral(tmp_path / "source", model)
    make_tokenizer_json(source)
    folder = converted(source, tmp_path / "converted", max_batch_size=4)
    args = ModelArgs.load_converted(folder / MODEL_ARGS)
    runner = load_engine(str(folder), args, EngineConfig(max_seq_len=128, device="cpu"), ALONE).runner
    tokens = torch.randint(0, 416, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    pages = tuple((0, index, index) for index in range(3))
    logits = runner.execute(StepPlan(1, (Chunk(0, 0, tuple(tokens), 1),), pages))[0]
    torch.testing.assert_close(logits, model(torch.tensor([tokens])).logits[0, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_and_the_weights_are_those_of_the_same_model_in_hugging_faces_format(tmp_path, name):
    model = tiny_model(name)
    ours = ConsolidatedReader(write_mistral(tmp_path / "source", model))
    theirs = HuggingFaceReader(save(model, tmp_path / "hf"))
    assert ours.args == theirs.args
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, source in theirs.tensors.items():
        assert torch.equal(ours.tensors[key].read(0, 3, 9), source.read(0, 3, 9)), key


def test_parts_with_an_index_are_read_as_one_file_is(tmp_path):
    """As of Mistral Large."""
    model = tiny_model("mistral")
    one = ConsolidatedReader(write_mistral(tmp_path / "one", model))
    several = write_mistral(tmp_path / "several", model)
    tensors = load_file(several / "consolidated.safetensors")
    (several / "consolidated.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        name = f"consolidated-{part + 1:05d}-of-00002.safetensors"
        own = {key: tensor for index, (key, tensor) in enumerate(sorted(tensors.items())) if index % 2 == part}
        save_file(own, several / name)
        weight_map |= dict.fromkeys(own, name)
    (several / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = open_checkpoint(several)
    assert isinstance(reader, ConsolidatedReader)
    assert len(reader.files) == 2
    assert all(torch.equal(reader.tensors[n].read(0, 0, 9), source.read(0, 0, 9)) for n, source in one.tensors.items())


def test_of_two_forms_in_a_folder_hugging_faces_is_read_and_inspect_says_so(tmp_path):
    model = tiny_model("mistral")
    folder = write_mistral(tmp_path / "both", model)
    found = inspect_checkpoint(folder)
    assert found.format == "Mistral AI's consolidated.safetensors"
    assert found.files == 1
    save(model, folder)
    assert isinstance(open_checkpoint(folder), HuggingFaceReader)
    found = inspect_checkpoint(folder)
    assert found.format == "Hugging Face's safetensors (MistralForCausalLM)"
    assert "consolidated.safetensors, which is here as well, is not read" in found.notes
    (folder / "model.safetensors").unlink()  # config.json alone does not make a model
    assert isinstance(open_checkpoint(folder), ConsolidatedReader)
    with pytest.raises(ValueError, match=r"=2, but .* holds consolidated\.safetensors; leave it out"):
        open_checkpoint(folder, model_parallel_size=2)


def test_metas_params_go_with_consolidated_safetensors_too(tmp_path):
    tensors = meta_tensors()
    save_file(tensors, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": -1}))
    reader = open_checkpoint(tmp_path)
    assert isinstance(reader, ConsolidatedReader)
    assert (reader.args.vocab_size, reader.args.hidden_dim) == (512, 176)
    assert all(torch.equal(reader.tensors[n].read(0, 0, 8), tensor[:8]) for n, tensor in tensors.items())


def test_mistral_ais_first_release_is_one_of_metas_shards_with_its_own_params(tmp_path):
    model = tiny_model("mistral")
    params = {"sliding_window": WINDOW, "rope_theta": None}
    write_meta(tmp_path, mistral_tensors(model))
    write_params(tmp_path, model, **params)
    reader = open_checkpoint(tmp_path)
    assert isinstance(reader, FairscaleReader)
    assert (reader.args.context_limit, reader.args.rope_theta, reader.args.hidden_dim) == (WINDOW, 10000.0, 96)


PUBLISHED = {
    "7B v0.1": {
        "dim": 4096,
        "n_layers": 32,
        "head_dim": 128,
        "hidden_dim": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "norm_eps": 1e-05,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "7B v0.3": {
        "dim": 4096,
        "n_layers": 32,
        "head_dim": 128,
        "hidden_dim": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "norm_eps": 1e-05,
        "vocab_size": 32768,
        "rope_theta": 1000000.0,
    },
}


@pytest.mark.parametrize(("name", "theta", "window"), [("7B v0.1", 1e4, 4096), ("7B v0.3", 1e6, None)])
def test_published_params_give_the_published_architecture(tmp_path, name, theta, window):
    """The theta of v0.1 is in its config.json on the hub, but not in its params.json."""
    from llama_tp.checkpoint.formats.params import read_params

    (tmp_path / "params.json").write_text(json.dumps(PUBLISHED[name]))
    args = read_params(tmp_path / "params.json")
    assert (args.hidden_dim, args.head_dim, args.attention_head_dim) == (14336, 128, None)
    assert (args.rope_theta, args.context_limit, args.max_seq_len) == (theta, window, 2048)
    assert not args.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"sliding_window": WINDOW}, WINDOW),
        ({"_sliding_window": WINDOW}, WINDOW),
        ({"sliding_window": [None, WINDOW, WINDOW, 100]}, WINDOW),
        ({"sliding_window": [None, None]}, None),
        ({"max_seq_len": 32768, "causal": True, "model_type": "transformer", "moe": None, "dtype": "bfloat16"}, None),
    ],
    ids=str,
)
def test_a_sliding_window_limits_the_context(tmp_path, changes, limit):
    """Of all layers, or one for each layer in turn, as of Ministral 8B."""
    args = ConsolidatedReader(write_mistral(tmp_path, tiny_model("mistral"), **changes)).args
    assert args.context_limit == limit
    assert args.max_seq_len == (limit or 2048)


REFUSED = {
    "experts": ({"moe": {"num_experts": 8}}, "moe={'num_experts': 8} is not supported: only dense text models"),
    "images": ({"vision_encoder": {"hidden_size": 8}}, "vision_encoder={'hidden_size': 8} is not supported"),
    "quantized": ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization={'qformat_weight': 'fp8_e4m3'}"),
    "yarn": ({"yarn": {"factor": 8}}, "yarn={'factor': 8} is not supported"),
    "something long": ({"x": "y" * 9999}, "x='yyy"),
    "another kind": ({"model_type": "mamba"}, "model_type='mamba' is not supported, only 'transformer'"),
    "another activation": ({"activation": "gelu"}, "activation='gelu' is not supported, only 'silu'"),
    "a window of text": ({"sliding_window": "4096"}, "sliding_window='4096' must be a positive integer, null, or a"),
    "a window of 0": ({"sliding_window": [0]}, "sliding_window=[0] must be a positive integer, null, or a list"),
    "no dim": ({"dim": None}, "key 'dim' is missing"),
    "a negative size": ({"hidden_dim": -5}, "hidden_dim=-5 must be"),
    "an odd head": ({"head_dim": 15}, "head_dim=15 must be even"),
    "text for a number": ({"rope_theta": "1e6"}, 'rope_theta="1e6" must be a number'),
    "other layers": ({"n_layers": 3}, "9 tensor(s) missing: layers.2.attention.wk.weight"),
    "fewer layers": ({"n_layers": 1}, "unexpected: layers.1.attention.wk.weight"),
    "another hidden size": ({"hidden_dim": 128}, "has shape (96, 64), expected (128, 64) from params.json"),
    "another vocabulary": ({"vocab_size": 400}, "params.json says vocab_size=400 but the embedding has 416 rows"),
    "an output of tied embeddings": (
        {"tied_embeddings": True},
        "tied_embeddings=true, but there is output.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(tmp_path, case):
    changes, words = REFUSED[case]
    write_mistral(tmp_path, tiny_model("mistral"), **changes)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        ConsolidatedReader(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("tokenizer.model.v3",), "tokenizer.model.v3"),
        (("tokenizer.model.v3", "tokenizer.model.v11", "tekken.json"), "tokenizer.model.v11"),
        (("tokenizer.model.v7", "tokenizer.model.v7m1"), "tokenizer.model.v7m1"),
        (("tokenizer.model.v3", "tokenizer.model"), "tokenizer.model"),
    ],
)
def test_a_versioned_tokenizer_is_found_and_kept_under_the_usual_name(tmp_path, names, chosen):
    source = write_mistral(tmp_path / "source", tiny_model("mistral"))
    for name in names:
        (source / name).write_bytes(b"not this one")
    made = make_sentencepiece_model(tmp_path)
    shutil.copyfile(made, source / chosen)
    folder = converted(source, tmp_path / "converted")
    assert (folder / "tokenizer.model").read_bytes() == made.read_bytes()
    assert load_tokenizer(folder).kind == "sentencepiece"
    assert StoredReader(folder).about == {"source": "consolidated", "dtype": "float32"}


@pytest.mark.parametrize("as_file", [False, True])
def test_tekken_is_refused_with_the_remedy(tmp_path, as_file):
    source = write_mistral(tmp_path / "source", tiny_model("mistral"))
    (source / "tekken.json").write_text('{"config": {}, "vocab": []}')
    words = r"tekken\.json, which is not supported; pass the model's tokenizer\.json, or convert its Hugging Face form$"
    with pytest.raises(ValueError, match=words) as error:
        convert(str(source), str(source / "tekken.json") if as_file else None, None, str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_transformers_would_read_the_same_from_the_export(tmp_path):
    """The way back to Hugging Face's format."""
    from llama_tp.checkpoint.export import export

    model = tiny_model("mistral")
    source = write_mistral(tmp_path / "source", model)
    make_tokenizer_json(source)
    export(converted(source, tmp_path / "converted"), tmp_path / "hf", format="hf")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
