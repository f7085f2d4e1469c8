"""`inspect` says what a checkpoint is, whatever its format, and reads none of its weights."""

from __future__ import annotations

import json

import pytest
import torch

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats import gguf as gguf_module
from llama_tp.checkpoint.formats import safetensors_files
from llama_tp.checkpoint.formats.fairscale import ShardedTensor
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store import stored
from tests.tiny_checkpoint import flip_bit, meta_tensors, write_checklist, write_meta
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_gguf import META_TO_GGUF, write_gguf
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_text import CHATML_TEMPLATE, make_sentencepiece_model, make_tokenizer_json


@pytest.fixture
def unread(monkeypatch):
    """Reading weights fails."""

    def read(*_):
        raise AssertionError("weights were read")

    for source in (
        ShardedTensor,
        stored.ChunkedTensor,
        safetensors_files.StoredTensor,
        gguf_module.QuantisedTensor,
    ):
        monkeypatch.setattr(source, "read", read)


def test_meta_s_shards_are_described(tmp_path, unread):
    folder = write_originals(tmp_path / "originals", num_shards=2)
    found = inspect_checkpoint(folder)
    tensors = meta_tensors()
    assert found.format == "Meta's shards (2)"
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (found.tensors, found.files, found.dtype) == (len(tensors), 2, "bfloat16")
    assert found.num_bytes == sum(path.stat().st_size for path in folder.glob("*.pth"))
    assert (found.tokenizer, found.tokens) == ("sentencepiece", 400)
    assert found.chat_format.startswith("llama2 (the vocabulary is a sentencepiece model, ")
    assert found.features == ()
    assert found.notes == (
        "no chat template",
        "the embedding has 112 rows more than the vocabulary has tokens",
        "no checklist.chk: damaged shards cannot be told from sound ones",
    )
    write_checklist(folder)
    assert not [note for note in inspect_checkpoint(folder).notes if "checklist" in note]


@pytest.fixture
def pair(tmp_path):
    """(originals, the converted checkpoint)."""
    originals = write_originals(tmp_path / "originals", num_shards=2)
    return originals, convert_beside(originals)


def test_a_converted_checkpoint_is_described_as_its_originals_are(pair, unread):
    originals, folder = pair
    before, found = inspect_checkpoint(originals), inspect_checkpoint(folder)
    assert found.format == "converted checkpoint, from Meta's shards (2)"
    assert [note for note in before.notes if "checklist" not in note] == list(found.notes)
    own = {"path", "format", "files", "num_bytes", "notes"}
    for name in set(found.__slots__) - own:
        assert getattr(found, name) == getattr(before, name), name


def test_a_hugging_face_model_is_described(tmp_path, unread):
    model = tiny_model("qwen2, window")
    folder = save(model, tmp_path / "qwen", torch.float16)
    make_tokenizer_json(folder)
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    found = inspect_checkpoint(folder)
    assert found.format == "Hugging Face's safetensors (Qwen2ForCausalLM)"
    assert found.features == ("biases on q, k and v",)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert (found.dtype, found.tokenizer, found.args.context_limit) == ("float16", "tokenizer.json", 72)
    assert found.chat_format == "jinja (the chat_template in chat_template.jinja)"
    assert any(note.startswith("served up to 72 tokens: ") for note in found.notes)
    assert "no chat template" not in found.notes


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("llama, tied", ("tied embeddings",)),
        ("llama, biases", ("biases on q, k and v, the attention's output, the feed-forward",)),
        ("llama, wide heads", ("heads of 24, not dim / n_heads",)),
        ("llama 3.1", ("llama3 rope scaling by 4",)),
        ("llama, linear", ("linear rope scaling by 2.5",)),
        ("qwen3", ("norms of q and k", "heads of 32, not dim / n_heads")),
    ],
)
def test_features_that_not_every_llama_has_are_named(tmp_path, name, features, unread):
    found = inspect_checkpoint(save(tiny_model(name), tmp_path))
    assert found.features == features
    assert found.tokenizer is found.chat_format is found.tokens is None
    assert any(note.startswith("no tokenizer: ") for note in found.notes)


def test_a_gguf_file_is_described(tmp_path, unread):
    write_gguf(tmp_path / "a.gguf")
    found = inspect_checkpoint(tmp_path / "a.gguf")
    assert found.format == "a GGUF file"
    assert (found.tensors, found.files) == (len(META_TO_GGUF), 1)
    assert found.num_bytes == (tmp_path / "a.gguf").stat().st_size
    assert any(note.startswith("quantized tensors that become bfloat16: ") for note in found.notes)


def test_a_vocabulary_without_a_chat_format_says_why(tmp_path):
    write_meta(tmp_path, meta_tensors())
    make_sentencepiece_model(tmp_path, control_symbols=["[INST]"])
    found = inspect_checkpoint(tmp_path)
    assert found.chat_format is None
    assert any(note.startswith("no chat format: ") and "[INST] as a control token" in note for note in found.notes)


@pytest.fixture
def converted(tmp_path, capsys):
    """A tied model, converted from Hugging Face's files. What that printed is gone."""
    source = save(tiny_model("llama, tied"), tmp_path / "source")
    make_tokenizer_json(source)
    folder = tmp_path / "converted"
    convert(str(source), str(source), None, str(folder), model_args_path=str(folder / MODEL_ARGS))
    capsys.readouterr()
    return folder


def test_the_command_prints_aligned_lines_and_the_memory_of_ranks(run, converted):
    code, out, err = run("inspect", str(converted))
    assert (code, err) == (0, "")
    head, table = out.split("\n\n")
    values = {line[:14].strip(): line[14:] for line in head.splitlines() if line[0] != " "}
    assert values["format"] == "converted checkpoint, from Hugging Face's safetensors (LlamaForCausalLM)"
    assert values["attention"] == "4 heads of 16, 4 kv heads"
    assert values["features"] == "tied embeddings"
    assert values["context"] == "no limit known; max_seq_len is 2048"
    title, columns, *rows = table.splitlines()
    assert title == "Memory of the busiest rank, on a GPU and in float32:"
    assert len({len(line) for line in (columns, *rows)}) == 1, "columns are aligned"
    assert [row.split()[0] for row in rows] == ["1", "2", "4"], "no more than there are heads"


def test_the_command_prints_one_json_object_with_what_plan_says(run, converted):
    code, out, err = run("inspect", str(converted), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    inspection = inspect_checkpoint(converted)
    assert found["args"] == inspection.args.to_dict()
    assert (found["parameters"], found["num_bytes"]) == (inspection.parameters, inspection.num_bytes)
    assert [row["ranks"] for row in found["memory_per_rank"]] == [1, 2, 4]
    assert found["memory_per_rank"][0]["weights"] == 4 * inspection.parameters
    assert found["memory_per_rank"][0]["kv_cache_per_token"] == 2 * 2 * 4 * 16 * 4  # k and v, layers, heads, d, bytes
    plan = json.loads(run("plan", str(converted), "--json")[1])
    assert plan["dtype"] == "float32"
    of_size = {row["ranks"]: row for row in plan["sizes"]}
    for row in found["memory_per_rank"]:
        assert row == {key: of_size[row["ranks"]][key] for key in row}


def test_what_is_wrong_is_one_line(run, converted, tmp_path):
    flip_bit(converted / MODEL_ARGS, 5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"GGUF and nothing else")
    for path, words in (
        (converted, "is corrupt"),
        (tmp_path / "empty", "params.json"),
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "a.gguf", "a.gguf"),
    ):
        code, out, err = run("inspect", str(path))
        assert (code, out) == (1, "")
        assert err.startswith("llama-tp: ")
        assert err.count("\n") == 1
        assert words in err
    assert "json='yes' must be" in run("inspect", str(tmp_path), "--json=yes")[2]


def test_a_limit_is_in_the_line_on_the_context(run, tmp_path):
    folder = save(tiny_model("mistral, window"), tmp_path)
    assert "at most 72 tokens; max_seq_len is 72" in run("inspect", str(folder))[1]
