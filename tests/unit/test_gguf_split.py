"""The parts of a split GGUF file are found beside each other and read as one."""

from __future__ import annotations

import shutil

import gguf
import pytest
import torch

from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.open import open_checkpoint
from tests.tiny_gguf import write_model
from tests.tiny_huggingface import tiny_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a.gguf, and the same model as b-0000N-of-00003.gguf."""
    folder = tmp_path_factory.mktemp("split")
    model = tiny_model("qwen2")
    write_model(folder / "a.gguf", model)
    write_model(folder / "b.gguf", model, split_max_tensors=10)
    return folder


@pytest.fixture
def parts(written, tmp_path):
    """Copies of the three parts."""
    return [shutil.copy(path, tmp_path / path.name) for path in sorted(written.glob("b-*.gguf"))]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_stands_for_the_whole_model(written, parts, given):
    whole, split = GGUFReader(written / "a.gguf"), open_checkpoint(parts[given])
    assert [path.name for path in parts] == [f"b-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert split.files == parts
    assert split.args == whole.args
    assert split.tensors.keys() == whole.tensors.keys()
    for name, source in whole.tensors.items():
        assert torch.equal(split.tensors[name].read(0, 0, source.shape[0]), source.read(0, 0, source.shape[0])), name


def test_a_first_part_without_tensors_is_read(tmp_path):
    model = tiny_model("llama")
    write_model(tmp_path / "a.gguf", model, split_max_tensors=20, small_first_shard=True)
    reader = GGUFReader(sorted(tmp_path.iterdir())[0])
    assert len(gguf.GGUFReader(reader.files[0]).tensors) == 0
    assert "output.weight" in reader.tensors


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"is one of 3 parts, of which b-00002-of-00003\.gguf \(1 in all\) cannot"):
        GGUFReader(parts[0])
    far = parts[0].rename(parts[0].with_name("b-00001-of-00999.gguf"))
    with pytest.raises(ValueError, match=r"b-00002-of-00999\.gguf, .*00005-of-00999\.gguf, \.\.\. \(998 in all"):
        GGUFReader(far)


def test_a_part_with_another_name_is_told_which_it_needs(parts):
    alone = parts[1].rename(parts[1].with_name("model.gguf"))
    with pytest.raises(ValueError, match=r"model\.gguf says split\.no=1 and split\.count=3, expected 0 and 1 from its"):
        GGUFReader(alone)


def test_parts_that_were_swapped_are_refused(parts):
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ValueError, match=r"b-00002-of-00003\.gguf says split\.no=2 and split\.count=3, expected 1 and"):
        GGUFReader(parts[0])


def test_a_whole_model_is_no_part_by_its_name(written, parts):
    shutil.copy(written / "a.gguf", parts[0])
    with pytest.raises(ValueError, match=r"b-00001-of-00003\.gguf says split\.no=0 and split\.count=1, expected 0 and"):
        GGUFReader(parts[1])


def test_a_part_of_another_model_is_refused(tmp_path, parts):
    write_model(tmp_path / "c.gguf", tiny_model("llama"), split_max_tensors=8)
    shutil.copy(tmp_path / "c-00002-of-00003.gguf", parts[1])
    with pytest.raises(ValueError, match=r"b-00001-of-00003\.gguf: the 3 part\(s\) hold .* tensors .*, expected 26"):
        GGUFReader(parts[0])


def test_no_part_is_parsed_before_the_headers_of_all_were_checked(parts, monkeypatch):
    parts[2].write_bytes(parts[2].read_bytes()[:100])

    def parse(path):
        raise AssertionError(f"{path} was parsed")

    monkeypatch.setattr(gguf, "GGUFReader", parse)
    with pytest.raises(ValueError, match=r"b-00003-of-00003\.gguf is not a sound GGUF file: it ends within"):
        GGUFReader(parts[0])
