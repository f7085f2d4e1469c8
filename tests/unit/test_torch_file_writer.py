"""A file of torch.save, written tensor after tensor, is what torch.save itself would have written."""

from __future__ import annotations

import zipfile

import pytest
import torch

from llama_tp.checkpoint.formats.safetensors_writer import Layout
from llama_tp.checkpoint.formats.torch_file_writer import write_torch_file
from llama_tp.checkpoint.store.hashing_file import HashingFile


def tensors():
    return {
        "a": torch.arange(12.0).view(3, 4),
        "b": torch.arange(5).to(torch.bfloat16),
        "c": torch.arange(300_000).to(torch.float16).view(1000, 300),
    }


def layouts(entries):
    return {name: Layout(tuple(one.shape), one.dtype) for name, one in entries.items()}


def test_the_bytes_are_those_of_torch_save(tmp_path):
    """Its checksums included; only its id of the content, which is of the storages' memory, may differ."""
    entries = tensors()
    with HashingFile(tmp_path / "ours.pth") as file:
        write_torch_file(file, layouts(entries), lambda name: entries[name].split(2), {"again": "a"})
    torch.save({**entries, "again": entries["a"]}, tmp_path / "theirs.pth")
    with zipfile.ZipFile(tmp_path / "ours.pth") as ours, zipfile.ZipFile(tmp_path / "theirs.pth") as theirs:
        assert ours.testzip() is None
        contents = [{name.split("/", 1)[1]: one.read(name) for name in one.namelist()} for one in (ours, theirs)]
    assert contents[0].keys() == contents[1].keys()
    assert {name for name in contents[0] if contents[0][name] != contents[1][name]} <= {".data/serialization_id"}
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=True)
    assert all(torch.equal(loaded[name], one) for name, one in entries.items())
    assert loaded["again"].data_ptr() == loaded["a"].data_ptr()


class SparseFile:
    """Large blocks, which are zeros here, become holes."""

    def __init__(self, file):
        self.file = file

    def write(self, block):
        size = memoryview(block).nbytes
        if size > 1 << 20:
            self.file.seek(size, 1)
        else:
            self.file.write(block)
        return size

    def flush(self):
        self.file.flush()


def test_a_file_of_more_than_4_gb_is_read(tmp_path, monkeypatch):
    """Regression: beyond 4 GB, an entry has another extra field, after which its data was not recognized."""
    block = torch.zeros(1 << 26, dtype=torch.uint8).view(torch.bfloat16).view(1 << 15, -1)
    large = Layout((17 << 15, block.shape[1]), torch.bfloat16)
    entries = {"one": large, "two": large, "three": large, "four": large, "last": Layout((3,), torch.bfloat16)}
    last = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    with (tmp_path / "large.pth").open("wb") as file:
        write_torch_file(
            SparseFile(file), entries, lambda name: [last] if name == "last" else [block] * 17, {"same": "one"}
        )
    with zipfile.ZipFile(tmp_path / "large.pth") as archive:
        small = [entry for entry in archive.infolist() if entry.file_size < 1 << 20]
        assert len(small) > 5
        assert all(len(archive.read(entry)) == entry.file_size for entry in small)  # compares checksums
    loaded = torch.load(tmp_path / "large.pth", weights_only=True, mmap=True)
    assert torch.equal(loaded["last"], last)
    assert loaded["four"].shape == large.shape


def test_an_error_of_what_is_read_is_raised_as_it_is(tmp_path):
    def blocks(name):
        raise ValueError(f"cannot read {name}")

    with pytest.raises(ValueError, match="cannot read a"), HashingFile(tmp_path / "ours.pth") as file:
        write_torch_file(file, layouts(tensors()), blocks, {})
