"""Large files are hashed while they are loaded: once, until they change; and what was hashed is remembered safely."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import pytest
import torch

from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.store import dcp, hash_cache, load_verification
from llama_tp.checkpoint.store.manifest import HASH_CACHE, MANIFEST, write_manifest
from llama_tp.checkpoint.store.verify import SMALL, verify
from llama_tp.parallel.launch import join
from tests.tiny_checkpoint import ARGS, flip_bit, meta_tensors

LARGE = replace(ARGS, vocab_size=70_000)
WEIGHTS = "__0_0.distcp"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint whose file of weights is larger than what the quick check hashes."""
    folder = tmp_path_factory.mktemp("large") / "converted"
    folder.mkdir()
    tensors = meta_tensors()
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = torch.randn(LARGE.vocab_size, LARGE.dim).bfloat16()
    write_manifest(folder, known=dcp.save(MemoryReader.of(LARGE, tensors), folder))
    assert (folder / WEIGHTS).stat().st_size > SMALL
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy that may be changed; nothing else of it is remembered."""
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "converted")


@pytest.fixture
def settled(monkeypatch):
    """Files count as old enough at once."""
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", -1)


@pytest.fixture
def load(monkeypatch):
    """Load a folder; the files that were hashed for it."""
    hashed = []
    check_hash = load_verification.check_hash

    def record(path, *args):
        hashed.append(path.name)
        return check_hash(path, *args)

    monkeypatch.setattr(load_verification, "check_hash", record)

    def load(folder, verify_files="once"):
        hashed.clear()
        load_model(str(folder), LARGE, join("cpu"), torch.bfloat16, verify_files=verify_files)
        return list(hashed)

    return load


@pytest.mark.parametrize("where", [0.1, 0.35, 0.6, 0.85])
def test_a_flipped_bit_in_a_large_file_is_found_at_load_and_names_the_file(folder, where):
    """119 of 120 such bits were loaded, and 58 of them changed a token."""
    size = (folder / WEIGHTS).stat().st_size
    flip_bit(folder / WEIGHTS, int(where * size))
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is corrupt: its sha256") as error:
        load_model(str(folder), LARGE, join("cpu"), torch.bfloat16)
    assert "\n" not in str(error.value)
    assert not (folder / HASH_CACHE).exists()


def test_a_file_so_damaged_that_it_cannot_be_read_is_named_by_its_hash(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[: 1 << 20] = bytes(1 << 20)
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is corrupt: its sha256"):
        load_model(str(folder), LARGE, join("cpu"), torch.bfloat16)


def test_a_file_is_hashed_once(folder, load, settled):
    assert load(folder) == [WEIGHTS]
    assert load(folder) == []
    assert load(folder, "always") == [WEIGHTS]
    assert load(folder) == []


def test_a_load_by_size_hashes_nothing_and_remembers_nothing(folder, load, settled):
    assert load(folder, "size") == []
    assert load(folder) == [WEIGHTS]


def test_a_full_verification_counts(folder, load, settled):
    verify(folder)
    assert load(folder) == []


def test_a_change_is_noticed_even_if_the_time_of_change_is_set_back(folder, load, settled):
    load(folder)
    before = (folder / WEIGHTS).stat()
    flip_bit(folder / WEIGHTS, 9_000_000)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ValueError, match="is corrupt"):
        load(folder)


def test_a_file_that_was_put_in_the_place_of_another_is_hashed(folder, load, settled):
    load(folder)
    shutil.copy2(folder / WEIGHTS, folder / "copy")
    os.replace(folder / "copy", folder / WEIGHTS)
    assert load(folder) == [WEIGHTS]


def test_a_file_that_was_written_a_moment_ago_is_not_relied_on(folder, load, monkeypatch):
    """A second change within the same tick of the file system's clock would go unseen."""
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", 3_600 * 10**9)
    assert load(folder) == [WEIGHTS]
    assert load(folder) == [WEIGHTS]


def test_a_folder_that_is_moved_is_known_and_a_copy_is_not(folder, load, settled, tmp_path):
    load(folder)
    assert load(folder.rename(tmp_path / "moved")) == []
    copy = shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    assert (copy / HASH_CACHE).exists()
    assert load(copy) == [WEIGHTS]


def test_another_manifest_is_another_checkpoint(folder, load, settled):
    load(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["about"]["source"] = "elsewhere"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert load(folder) == [WEIGHTS]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 1}', "[" * 100_000, '{"files": {"__0_0.distcp": [1]}}']
)
def test_a_memory_that_is_damaged_is_forgotten(folder, load, settled, content):
    load(folder)
    (folder / HASH_CACHE).write_text(content)
    assert load(folder) == [WEIGHTS]
    assert load(folder) == []


def test_where_the_folder_cannot_be_written_to_the_user_s_cache_remembers(folder, load, settled, tmp_path):
    (folder / HASH_CACHE).mkdir()  # also root cannot write a file there
    assert load(folder) == [WEIGHTS]
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 1
    assert load(folder) == []
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert load(folder) == [WEIGHTS]


def test_where_nothing_can_be_written_every_load_hashes(folder, load, settled, tmp_path):
    (folder / HASH_CACHE).mkdir()
    (tmp_path / "cache").touch()
    assert load(folder) == [WEIGHTS]
    assert load(folder) == [WEIGHTS]


def test_what_is_remembered_is_no_part_of_the_checkpoint(folder, load, settled):
    load(folder)
    verify(folder)
    assert HASH_CACHE not in write_manifest(folder).files


def test_the_log_says_what_was_hashed_and_where_that_is_remembered(folder, load, settled, caplog):
    caplog.set_level(logging.INFO, logger="llama_tp")
    load(folder)
    (line,) = [record.message for record in caplog.records if "matches its manifest" in record.message]
    assert str(folder / HASH_CACHE) in line
    caplog.clear()
    load(folder)
    assert not caplog.records
