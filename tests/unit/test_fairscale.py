"""Meta's shards are put together exactly, whatever their number and style; unsound ones are refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from tests.tiny_checkpoint import ARGS, PARAMS, Evil, meta_tensors, split_as_meta, write_checklist, write_meta


def full(source):
    return source.read(0, 0, source.shape[0])


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama3", "llama2"])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_slice_is_that_of_the_full_tensor(tmp_path, num_shards, embedding_dim):
    tensors = meta_tensors()
    reader = FairscaleReader(write_meta(tmp_path, tensors, num_shards, embedding_dim=embedding_dim), num_shards)
    assert reader.tensors.keys() == tensors.keys()
    assert reader.dtype == torch.bfloat16
    for name, tensor in tensors.items():
        source = reader.tensors[name]
        assert (source.shape, source.dtype) == (tuple(tensor.shape), tensor.dtype)
        for dim, size in enumerate(tensor.shape):
            for start, length in (
                (0, size),
                (0, 1),
                (size - 1, 1),
                (size // 4 - 1, size // 2 + 1),
                (size // 2, size // 2),
            ):
                assert torch.equal(source.read(dim, start, length), tensor.narrow(dim, start, length)), (
                    name,
                    dim,
                    start,
                )


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_a_vocabulary_of_minus_one_is_read_off_the_embedding(tmp_path, num_shards, embedding_dim):
    params = {**PARAMS, "vocab_size": -1}
    write_meta(tmp_path, meta_tensors(), num_shards, embedding_dim=embedding_dim, params=params)
    assert FairscaleReader(tmp_path, num_shards).args.vocab_size == 512


def test_embeddings_are_tied_exactly_where_there_is_no_output(tmp_path):
    tensors = meta_tensors()
    assert not FairscaleReader(write_meta(tmp_path / "untied", tensors), 1).args.tied_embeddings
    del tensors["output.weight"]
    reader = FairscaleReader(write_meta(tmp_path / "tied", tensors, 2, embedding_dim=0), 2)
    assert reader.args.tied_embeddings
    assert torch.equal(full(reader.tensors["tok_embeddings.weight"]), tensors["tok_embeddings.weight"])


def _change(rank, change):
    def breaks(folder):
        path = folder / f"consolidated.{rank:02d}.pth"
        shard = torch.load(path, weights_only=True)
        torch.save(change(shard) or shard, path)

    return breaks


def _params(**changes):
    return lambda folder: (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))


def _truncate(folder):
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def _write_shard(data):
    return lambda folder: (folder / "consolidated.01.pth").write_bytes(data)


def _safetensors(folder):
    save_file({"a": torch.ones(3)}, folder / "consolidated.01.pth")


def _legacy(folder):
    torch.save({"a": torch.ones(3)}, folder / "consolidated.01.pth", _use_new_zipfile_serialization=False)


def _hostile(folder):
    torch.save({"tok_embeddings.weight": Evil(folder / "proof")}, folder / "consolidated.01.pth")


def _torchscript(folder):
    with zipfile.ZipFile(folder / "consolidated.01.pth", "w") as archive:
        for name, data in (("constants.pkl", b"\x80\x02)."), ("data.pkl", b"\x80\x02}."), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)


def _copy_shard(folder):
    shutil.copyfile(folder / "consolidated.00.pth", folder / "consolidated.01.pth")


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _hugging_face(folder):
    _empty(folder)
    LlamaConfig().save_pretrained(folder)
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")


def _repository(folder):
    _hugging_face(folder)
    write_meta(folder / "original", meta_tensors())


def _converted(folder):
    _empty(folder)
    write_manifest(folder, known=dcp.save(MemoryReader.of(ARGS, meta_tensors()), folder))


WQ = "layers.1.attention.wq.weight"
BROKEN = {
    "a shard is missing": (
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        ("consolidated.00.pth", "missing"),
    ),
    "a shard too many": (
        lambda folder: (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes()),
        ("--model_parallel_size 3",),
    ),
    "no shard at all": (lambda folder: [path.unlink() for path in folder.glob("*.pth")], ("no consolidated.*.pth",)),
    "an odd name": (lambda folder: (folder / "consolidated.xx.pth").touch(), ("consolidated.xx.pth",)),
    "truncated": (_truncate, ("consolidated.01.pth", "truncated")),
    "empty": (_write_shard(b""), ("consolidated.01.pth is empty; download it again",)),
    "garbage": (_write_shard(b"\0" * 9999), ("consolidated.01.pth was not written by torch.save",)),
    "a Git LFS pointer": (
        _write_shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556af\nsize 499723\n"),
        ("consolidated.01.pth is a Git LFS pointer", "git lfs pull"),
    ),
    "a login page": (_write_shard(b"<!DOCTYPE html><html>Sign in"), ("consolidated.01.pth is an HTML", "download")),
    "safetensors under another name": (_safetensors, ("consolidated.01.pth is a safetensors file",)),
    "the format of torch before 1.6": (
        _legacy,
        ("consolidated.01.pth is in the format of torch before 1.6", "rewrite it"),
    ),
    "a bare pickle": (_write_shard(pickle.dumps({"a": 1})), ("consolidated.01.pth is a bare pickle",)),
    "a hostile one": (_hostile, ("consolidated.01.pth is refused", "nothing in it was executed", "it needs io.open")),
    "the same shard twice": (_copy_shard, ("consolidated.01.pth", "the same weights as consolidated.00.pth")),
    "a listed shard that is missing": (
        lambda folder: (folder / "checklist.chk").write_text(f"{'0' * 32}  consolidated.03.pth\n"),
        ("consolidated.02.pth is missing",),
    ),
    "a checklist that is a page": (
        lambda folder: (folder / "checklist.chk").write_text("<html>"),
        ("checklist.chk is an HTML",),
    ),
    "a checklist that is none": (
        lambda folder: (folder / "checklist.chk").write_text("no sums here\n"),
        ("checklist.chk, line 1",),
    ),
    "params that are not those on the checklist": (
        lambda folder: (
            write_checklist(folder),
            (folder / "params.json").write_text(json.dumps({**PARAMS, "norm_eps": 1e-6})),
        ),
        ("params.json is damaged or is another file", "md5"),
    ),
    "a Hugging Face model": (_hugging_face, ("has no params.json", "Hugging Face model", "llama-tp convert")),
    "the repository around the originals": (
        _repository,
        ("Hugging Face repository; Meta's original weights are in", "/original"),
    ),
    "a converted checkpoint": (_converted, ("has no params.json", "is already a converted checkpoint")),
    "not a dict": (_change(1, lambda shard: list(shard.values())), ("consolidated.01.pth", "list", "dict")),
    "a non-tensor entry": (_change(1, lambda shard: shard.update(step=3)), ("consolidated.01.pth", "'step'", "int")),
    "a nested dict": (_change(0, lambda shard: {"model": shard}), ("consolidated.00.pth", "'model'", "dict")),
    "an integer tensor": (_change(1, lambda shard: shard.update({WQ: shard[WQ].int()})), (WQ, "torch.int32")),
    "another dtype": (
        _change(1, lambda shard: shard.update({WQ: shard[WQ].float()})),
        ("01.pth", WQ, "is torch.float32", "bfloat16 as in shard 0"),
    ),
    "a missing key": (_change(1, lambda shard: shard.__delitem__(WQ)), ("consolidated.01.pth", "missing", WQ)),
    "an unexpected key": (_change(1, lambda shard: shard.update(foo=shard[WQ])), ("unexpected", "foo")),
    "one shard without norm": (_change(1, lambda shard: shard.__delitem__("norm.weight")), ("01.pth", "norm.weight")),
    "a wrong shape": (
        _change(1, lambda shard: shard.update({WQ: shard[WQ][:-1]})),
        ("consolidated.01.pth", WQ, "(31, 64)", "(32, 64)"),
    ),
    "an embedding of another width": (
        _change(0, lambda shard: shard.update({"tok_embeddings.weight": torch.ones(512, 48).bfloat16()})),
        ("tok_embeddings.weight", "(512, 48)"),
    ),
    "no embedding": (
        _change(0, lambda shard: shard.__delitem__("tok_embeddings.weight")),
        ("tok_embeddings", "missing"),
    ),
    "a shard of another model": (
        lambda folder: torch.save(split_as_meta(meta_tensors(seed=9), 2, 1)[1], folder / "consolidated.01.pth"),
        ("consolidated.01.pth", "from different models"),
    ),
    "params of another model": (_params(n_layers=3), ("layers.2.", "missing")),
    "params of fewer layers": (_params(n_layers=1), ("layers.1.", "unexpected")),
    "params with another vocabulary": (_params(vocab_size=1000), ("vocab_size=1000", "512")),
    "params with another width": (_params(dim=128), ("tok_embeddings.weight", "dim=128")),
    "params with heads that do not divide": (_params(n_heads=1, n_kv_heads=1), ("n_heads=1",)),
    "params with other kv heads": (_params(n_kv_heads=8), ("attention.wk.weight", "(16, 64)", "(32, 64)")),
    "params with another hidden size": (_params(multiple_of=256), ("feed_forward", "(88, 64)", "(128, 64)")),
    "params with an unknown key": (_params(moe_experts=8), ("params.json", "moe_experts")),
    "no params": (lambda folder: (folder / "params.json").unlink(), ("params.json does not exist",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unsound_checkpoint_is_refused_in_one_line_that_says_where_and_what(tmp_path, case):
    breaks, words = BROKEN[case]
    write_meta(tmp_path, meta_tensors(), 2)
    breaks(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r".") as error:
        FairscaleReader(tmp_path, 2)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("told", "found"), [(1, 2), (4, 2), (2, 1)])
def test_a_wrong_number_of_shards_says_which_to_pass(tmp_path, told, found):
    write_meta(tmp_path, meta_tensors(), found)
    with pytest.raises(
        ValueError, match=rf"model_parallel_size={told} but .* holds {found} shard.*--model_parallel_size {found}"
    ):
        FairscaleReader(tmp_path, told)


def test_a_legacy_file_is_refused_with_a_command_that_rewrites_it(tmp_path):
    """As real PyTorch writes it without zip."""
    tensors = meta_tensors()
    folder = write_meta(tmp_path / "with a space", tensors, 2)
    for path in sorted(folder.glob("*.pth")):
        shard = torch.load(path, weights_only=True)
        torch.save(shard, path, _use_new_zipfile_serialization=False)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        with pytest.raises(ValueError, match=rf"{name} is in the format of torch before 1\.6") as error:
            FairscaleReader(folder)
        assert "\n" not in str(error.value)
        command = str(error.value).split("; rewrite it: ")[1].replace("python ", f"{sys.executable} ", 1)
        subprocess.run(["bash", "-c", command], check=True)
    reader = FairscaleReader(folder)
    assert all(torch.equal(full(reader.tensors[name]), tensor) for name, tensor in tensors.items())
    assert not list(folder.glob("*.new"))


def test_nothing_in_a_pth_is_executed(tmp_path):
    proof = tmp_path / "proof"
    for number, save in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)))):
        folder = write_meta(tmp_path / str(number), meta_tensors())
        save({"tok_embeddings.weight": Evil(proof)}, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=r"is refused, nothing in it was executed|is a bare pickle"):
            FairscaleReader(folder, 1)
    assert not proof.exists()


@pytest.mark.parametrize("make", [_hostile, _torchscript], ids=["a hostile file", "a TorchScript archive"])
def test_no_message_gives_the_advice_to_load_an_unsafe_file(tmp_path, make):
    """torch's own messages say how to get the code in the file executed."""
    make(write_meta(tmp_path, meta_tensors(), 2))
    with pytest.raises(ValueError, match="nothing in it was executed") as error:
        FairscaleReader(tmp_path, 2)
    assert "weights_only" not in str(error.value)
