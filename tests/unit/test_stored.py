"""A converted checkpoint reads as the originals did, a slice at a time; what has changed since is refused."""

from __future__ import annotations

import json

import pytest
import torch

from llama_tp.checkpoint.store import verify as verify_module
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader, is_stored
from tests.tiny_checkpoint import flip_bit, meta_tensors
from tests.tiny_converted import convert_beside, write_originals


@pytest.fixture
def folder(tmp_path):
    return convert_beside(write_originals(tmp_path / "originals", num_shards=2))


def test_every_slice_is_that_of_the_originals(folder):
    """Also across chunks, and along the dim that is not cut."""
    reader = StoredReader(folder)
    expected = meta_tensors()
    assert reader.tensors.keys() == expected.keys()
    assert reader.dtype == torch.bfloat16
    for name, full in expected.items():
        source = reader.tensors[name]
        assert (source.shape, source.dtype) == (tuple(full.shape), full.dtype)
        for dim, size in enumerate(full.shape):
            for start, length in ((0, size), (1, size - 1), (size // 3, size // 2)):
                assert torch.equal(source.read(dim, start, length), full.narrow(dim, start, length)), name


def test_only_converted_checkpoints_are_taken_for_one(folder, tmp_path):
    assert is_stored(folder)
    assert not is_stored(tmp_path / "originals")
    assert not is_stored(folder / "model_args.json")
    with pytest.raises(ValueError, match="holds Meta's original weights"):
        StoredReader(tmp_path / "originals")


def test_a_damaged_file_is_found_by_the_time_that_all_is_read(folder, monkeypatch):
    """Small ones when the reader is made, large ones beside reading."""
    from llama_tp.checkpoint.store import load_verification

    shard = next(folder.glob("*.distcp"))
    flip_bit(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match="is corrupt: its sha256"):
        StoredReader(folder)
    for module in (load_verification, verify_module):
        monkeypatch.setattr(module, "SMALL", 5000)
    reader = StoredReader(folder)
    with reader.reading() as verification:
        reader.tensors["norm.weight"].read(0, 0, 64)
        with pytest.raises(ValueError, match=rf"{shard.name} is corrupt: its sha256"):
            verification.finish()


def test_weights_of_another_model_than_its_arguments_are_refused(folder):
    args = json.loads((folder / MODEL_ARGS).read_text())
    (folder / MODEL_ARGS).write_text(json.dumps({**args, "n_layers": 3}))
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"layers\.2\..* is not in the checkpoint") as error:
        StoredReader(folder)
    assert "\n" not in str(error.value)
    (folder / MODEL_ARGS).rename(folder.parent / "elsewhere.json")
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"does not list model_args\.json"):
        StoredReader(folder)
