"""The stored form: any TP size reads its bytes once, PyTorch's own reader reads it, and nothing unsound is loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import LlamaConfig

from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.chunks import chunk_bounds
from llama_tp.checkpoint.store.manifest import MANIFEST, write_manifest
from llama_tp.checkpoint.store.verify import verify
from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes
from llama_tp.parallel.sharding import shard, tp_dim
from tests.tiny_checkpoint import ARGS, Evil, meta_tensors, write_meta

LAYOUTS = {
    "7B": ModelArgs(dim=4096, n_layers=1, n_heads=32, n_kv_heads=32, vocab_size=32000),
    "70B": ModelArgs(
        dim=8192, n_layers=1, n_heads=64, n_kv_heads=8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3
    ),
    "8B": ModelArgs(
        dim=4096, n_layers=1, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024, ffn_dim_multiplier=1.3
    ),
    "SmolLM2": ModelArgs(dim=576, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=49152, tied_embeddings=True),
    "12 and 8 ranks": ModelArgs(dim=768, n_layers=1, n_heads=24, n_kv_heads=24, vocab_size=1000, multiple_of=96),
    "a vocabulary that does not divide": replace(ARGS, vocab_size=509),
}


@pytest.mark.parametrize("model", LAYOUTS)
def test_the_share_of_each_rank_at_each_tp_size_is_a_union_of_whole_chunks(model):
    args = LAYOUTS[model]
    for name, shape in weight_shapes(args).items():
        chunks = chunk_bounds(args, name, shape, 8)
        dim = tp_dim(name)
        starts = {start for start, _ in chunks} | {shape[dim or 0]}
        assert [start for start, _ in chunks] == [sum(length for _, length in chunks[:i]) for i in range(len(chunks))]
        assert sum(length for _, length in chunks) == shape[dim or 0]
        if dim is None:
            assert len(chunks) == 1
            continue
        for size in range(1, min(8, args.n_heads) + 1):
            for rank in range(size):
                for _, one in shard(args, name, size, rank).parts:
                    assert {one.start, one.stop} <= starts, (name, size, rank)


@pytest.mark.parametrize(
    ("model", "tp_max", "hidden", "kv"),
    [("7B", 1, 1, 1), ("7B", 2, 2, 2), ("7B", 4, 6, 6), ("8B", 8, 22, 8), ("SmolLM2", 3, 4, 3)],
)
def test_there_are_no_more_chunks_than_the_sizes_up_to_the_largest_need(model, tp_max, hidden, kv):
    """At most the distinct fractions k / n for n up to tp_max: 1, 2, 4, 6, 10, 12, 18, 22."""
    args = LAYOUTS[model]
    shapes = weight_shapes(args)
    for name, count in (("feed_forward.w2", hidden), ("attention.wk", kv)):
        name = f"layers.0.{name}.weight"
        assert len(chunk_bounds(args, name, shapes[name], tp_max)) == count


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(full tensors, a checkpoint folder of them)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = meta_tensors()
    files = dcp.save(MemoryReader.of(ARGS, tensors), folder)
    ARGS.save(folder / "model_args.json")
    write_manifest(folder, known=files)
    return tensors, folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the checkpoint that may be broken."""
    return shutil.copytree(made[1], tmp_path / "copy")


def blank(tensors, dtype=torch.bfloat16):
    return {name: torch.full_like(tensor, float("nan"), dtype=dtype) for name, tensor in tensors.items()}


def test_pytorchs_own_reader_reads_it(made):
    tensors, folder = made
    target = blank(tensors)
    torch_dcp.load(target, storage_reader=torch_dcp.FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)


def test_load_fills_the_same_tensors_in_place_and_converts(made):
    tensors, folder = made
    for dtype in (torch.bfloat16, torch.float32):
        target = blank(tensors, dtype)
        pointers = {name: tensor.data_ptr() for name, tensor in target.items()}
        dcp.load(target, folder)
        assert all(torch.equal(target[name], tensors[name].to(dtype)) for name in tensors)
        assert {name: tensor.data_ptr() for name, tensor in target.items()} == pointers
    assert dcp.checkpoint_dtype(folder) == torch.bfloat16


def test_chunks_do_not_drag_their_storage_along(made):
    tensors, folder = made
    stored = [
        torch.load(_payload(folder, info), weights_only=True)
        for info in dcp.read_metadata(folder).storage_data.values()
    ]
    assert len(stored) > 100
    assert all(chunk.untyped_storage().nbytes() == chunk.nbytes for chunk in stored)
    assert sum(chunk.nbytes for chunk in stored) == sum(tensor.nbytes for tensor in tensors.values())


def _payload(folder, info):
    import io

    return io.BytesIO((folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length])


def test_files_are_closed_at_the_size_limit_and_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "FILE_BYTES", 20_000)
    tensors = meta_tensors()
    write_manifest(tmp_path, known=dcp.save(MemoryReader.of(ARGS, tensors), tmp_path))
    assert len(list(tmp_path.glob("*.distcp"))) > 5
    verify(tmp_path)
    target = blank(tensors)
    dcp.load(target, tmp_path)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)


def test_the_same_weights_give_the_same_bytes(made, tmp_path):
    tensors, folder = made
    dcp.save(MemoryReader.of(ARGS, tensors), tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_what_is_missing_unexpected_or_misshapen_is_named(made):
    tensors, folder = made
    target = blank(tensors)
    target["layers.7.attention.wq.weight"] = target.pop("layers.1.attention.wq.weight")
    target["norm.weight"] = torch.empty(65)
    with pytest.raises(ValueError, match=r"\(65,\)") as error:
        dcp.load(target, folder)
    message = str(error.value)
    assert "layers.7.attention.wq.weight is not in the checkpoint" in message
    assert "layers.1.attention.wq.weight is in the checkpoint but not in the model" in message
    assert "norm.weight has shape (64,) in the checkpoint, (65,) in the model" in message
    assert "\n" not in message
    assert target["output.weight"].isnan().all()


def _edit_metadata(change):
    def breaks(folder):
        with (folder / ".metadata").open("rb") as file:
            metadata = pickle.load(file)
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        write_manifest(folder)

    return breaks


def _elsewhere(metadata):
    info = next(iter(metadata.storage_data.values()))
    info.relative_path = "../../etc/passwd"


def _beyond(metadata):
    next(iter(metadata.storage_data.values())).offset = 1 << 40


def _gap(metadata):
    metadata.state_dict_metadata["output.weight"].chunks.pop()


def _non_tensor(metadata):
    metadata.state_dict_metadata["norm.weight"] = BytesStorageMetadata()


def _flip_bit(folder):
    path = folder / ".metadata"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def _link(folder):
    outside = folder.parent / "outside.distcp"
    shutil.move(folder / "__0_0.distcp", outside)
    (folder / "__0_0.distcp").symlink_to(outside)


def _manifest(change):
    def breaks(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return breaks


BROKEN = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json does not exist"),
    "a manifest that is none": (lambda folder: (folder / MANIFEST).write_text("[1, 2"), "is not a manifest"),
    "a manifest of lists": (lambda folder: (folder / MANIFEST).write_text("[]"), "is not a manifest"),
    "a manifest of the future": (_manifest(lambda m: m.update(format_version=2)), "format_version=2"),
    "a manifest that leaves the folder": (
        _manifest(lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}})),
        "'../x' is not a file name",
    ),
    "a file that Git LFS has not fetched": (
        lambda folder: (folder / "__0_0.distcp").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:9e\n"
        ),
        "__0_0.distcp is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "Meta's originals": (
        lambda folder: (_remove_all(folder), write_meta(folder, meta_tensors())),
        "holds Meta's original weights; convert them with `llama-tp convert`",
    ),
    "a Hugging Face model": (
        lambda folder: (_remove_all(folder), LlamaConfig().save_pretrained(folder)),
        "holds a Hugging Face model; convert it with `llama-tp convert`",
    ),
    "a missing file": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a truncated file": (lambda folder: os.truncate(folder / "__0_0.distcp", 5000), "__0_0.distcp has 5000 bytes"),
    "an extra weight file": (lambda folder: (folder / "__1_0.distcp").touch(), "__1_0.distcp is not in manifest.json"),
    "a link": (_link, "not a regular file"),
    "changed model_args": (
        lambda folder: _replace_in(folder / "model_args.json", '"n_layers": 2', '"n_layers": 3'),
        "model_args.json is corrupt",
    ),
    "changed metadata": (_flip_bit, ".metadata is corrupt"),
    "a chunk in another folder": (_edit_metadata(_elsewhere), "../../etc/passwd"),
    "a chunk beyond its file": (_edit_metadata(_beyond), "is outside"),
    "a chunk that is missing": (_edit_metadata(_gap), "output.weight is incomplete"),
    "a non-tensor entry": (_edit_metadata(_non_tensor), "BytesStorageMetadata, which checkpoints never need"),
}


def _remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


def _replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("case", BROKEN)
def test_an_unsound_checkpoint_is_refused_before_anything_is_read(made, copy, case):
    breaks, words = BROKEN[case]
    breaks(copy)
    target = blank(made[0])
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        dcp.load(target, copy)
    assert "\n" not in str(error.value)
    assert all(tensor.isnan().all() for tensor in target.values())


@pytest.mark.parametrize("where", ["as the metadata", "in the metadata", "through a dotted name"])
def test_nothing_in_the_metadata_is_executed(copy, where, tmp_path):
    proof = tmp_path / "proof"
    if where == "through a dotted name":
        reach = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
        (copy / ".metadata").write_bytes(reach + b"\x8c\x04true\x85R.")
        write_manifest(copy)
    elif where == "as the metadata":
        (copy / ".metadata").write_bytes(pickle.dumps(Evil(proof)))
        write_manifest(copy)
    else:
        _edit_metadata(lambda metadata: setattr(metadata, "planner_data", Evil(proof)))(copy)
    with pytest.raises(ValueError, match=r"\.metadata is refused, nothing in it was executed"):
        dcp.load({}, copy)
    assert not proof.exists()


def test_nothing_in_a_chunk_is_executed(made, copy, tmp_path):
    proof = tmp_path / "proof"
    info = next(iter(dcp.read_metadata(copy).storage_data.values()))
    path = copy / info.relative_path
    data = bytearray(path.read_bytes())
    evil = pickle.dumps(Evil(proof))
    data[info.offset : info.offset + len(evil)] = evil
    path.write_bytes(data)
    write_manifest(copy)
    with pytest.raises(ValueError, match=re.escape(f"{path} is ")) as error:
        dcp.load(blank(made[0]), copy)
    assert "\n" not in str(error.value)
    assert "nothing in it was executed" in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not proof.exists()


def test_a_flipped_bit_of_a_weight_is_found_by_the_full_verification(copy):
    verify(copy)
    path = copy / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is corrupt: its sha256"):
        verify(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    """One NaN in a matrix makes every answer nonsense, and was written without a word."""
    tensors = meta_tensors(dtype)
    tensors["layers.1.attention.wo.weight"][3, 50] = value
    with pytest.raises(ValueError, match=r"^layers\.1\.attention\.wo\.weight has non-finite weights") as error:
        dcp.save(MemoryReader.of(ARGS, tensors), tmp_path)
    assert "\n" not in str(error.value)


def test_a_disk_that_fails_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*: \w+Error: ") as error:
        dcp.save(MemoryReader.of(ARGS, meta_tensors()), tmp_path / "file")
    assert "\n" not in str(error.value)
