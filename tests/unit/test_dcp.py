"""The stored form: any TP size reads its bytes once, PyTorch's own reader reads it, and nothing unsound is loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from transformers import LlamaConfig

from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp, reading
from llama_tp.checkpoint.store.chunks import chunk_bounds
from llama_tp.checkpoint.store.manifest import MANIFEST, load_manifest, write_manifest
from llama_tp.checkpoint.store.reading import Slices, StoredFiles, load
from llama_tp.checkpoint.store.table import TABLE, load_table
from llama_tp.checkpoint.store.verify import verify
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import shard, tp_dim
from tests.published_params import LLAMA_2_7B, LLAMA_2_70B
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
        load(target, folder)
        assert all(torch.equal(target[name], tensors[name].to(dtype)) for name in tensors)
        assert {name: tensor.data_ptr() for name, tensor in target.items()} == pointers
    assert StoredFiles(folder).dtype == torch.bfloat16


def test_chunks_do_not_drag_their_storage_along(made):
    tensors, folder = made
    stored = 0
    for index, info in torch_dcp.FileSystemReader(folder).read_metadata().storage_data.items():
        payload = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        chunk = torch.load(io.BytesIO(payload), weights_only=True)
        assert chunk.untyped_storage().nbytes() == chunk.nbytes, index
        stored += chunk.nbytes
    assert stored == sum(tensor.nbytes for tensor in tensors.values())


def test_the_table_says_where_the_bytes_of_every_chunk_are(made):
    """Also without torch: the bytes at these places are those of the tensors."""
    tensors, folder = made
    for name, stored in load_table(folder, load_manifest(folder)).items():
        for chunk in stored.chunks:
            expected = tensors[name].narrow(stored.dim, chunk.start, chunk.length).contiguous()
            data = (folder / chunk.file).read_bytes()[chunk.offset :][: expected.nbytes]
            assert data == bytes(expected.view(torch.uint8).numpy().tobytes()), (name, chunk)


@pytest.mark.parametrize("piece", [1, 100, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_part_is_read_in_pieces_of_any_size(made, monkeypatch, piece, dtype):
    """Across chunks, along either dim, into parts of larger tensors."""
    monkeypatch.setattr(reading, "_PIECE", piece)
    tensors, folder = made
    wanted, expected = {}, {}
    for name, full in tensors.items():
        for dim, size in enumerate(full.shape):
            first, second = range(1, size // 2), range(size // 2 + 3, size - 1)
            shape = [len(first) + len(second) if at == dim else other for at, other in enumerate(full.shape)]
            target = torch.full(shape, float("nan"), dtype=dtype)
            parts = [(first, target.narrow(dim, 0, len(first))), (second, target.narrow(dim, len(first), len(second)))]
            wanted[name, dim] = target, Slices(dim, parts, tuple(full.shape))
            expected[name, dim] = torch.cat([full.narrow(dim, one.start, len(one)) for one in (first, second)], dim)
    with StoredFiles(folder) as files:
        for (name, dim), (target, slices) in wanted.items():
            files.read({name: slices})
            assert torch.equal(target, expected[name, dim].to(dtype)), (name, dim)


def test_a_file_that_shrinks_while_it_is_read_is_named(made, copy):
    files = StoredFiles(copy)
    os.truncate(copy / "__0_0.distcp", 5000)
    target = blank(made[0])
    with pytest.raises(ValueError, match=r"__0_0\.distcp was truncated while it was read"):
        files.read({name: Slices.whole(tensor) for name, tensor in target.items()})


def test_hosts_with_different_checkpoints_do_not_serve_together(made, monkeypatch):
    monkeypatch.setattr(reading, "gather", lambda digest: [digest, digest, "another"])
    with pytest.raises(ValueError, match=r"manifest\.json of rank 2 differs from that of rank 0; copy"):
        reading.open_on_all_ranks(made[1])


def test_threads_that_start_after_a_read_compute_as_before(made):
    threads = torch.get_num_threads()
    with StoredFiles(made[1]) as files:
        files.read({"norm.weight": Slices.whole(torch.empty(64))})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


def test_files_are_closed_at_the_size_limit_and_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "FILE_BYTES", 20_000)
    tensors = meta_tensors()
    write_manifest(tmp_path, known=dcp.save(MemoryReader.of(ARGS, tensors), tmp_path))
    assert len(list(tmp_path.glob("*.distcp"))) > 5
    verify(tmp_path)
    target = blank(tensors)
    load(target, tmp_path)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("published", "workers"), [(LLAMA_2_7B, 4), (LLAMA_2_70B, 2)])
def test_fewer_threads_write_a_model_whose_matrices_are_large(tmp_path, monkeypatch, published, workers):
    """Each holds one matrix that is cut in columns: 90 MB of the small model, 470 MB of the large one."""
    monkeypatch.setattr(dcp, "num_workers", lambda: 4)
    args = ModelArgs.from_params({**json.loads(published), "vocab_size": 32000})
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in weight_shapes(args).items()}
    reader = MemoryReader.of(args, tensors)
    assert dcp._bounded_workers(reader, reader.tensors) == workers


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_weights_give_the_same_bytes(made, tmp_path, workers):
    tensors, folder = made
    dcp.save(MemoryReader.of(ARGS, tensors), tmp_path, workers=workers)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_what_is_missing_unexpected_or_misshapen_is_named(made):
    tensors, folder = made
    target = blank(tensors)
    target["layers.7.attention.wq.weight"] = target.pop("layers.1.attention.wq.weight")
    target["norm.weight"] = torch.empty(65)
    with pytest.raises(ValueError, match=r"\(65,\)") as error:
        load(target, folder)
    message = str(error.value)
    assert "layers.7.attention.wq.weight is not in the checkpoint" in message
    assert "layers.1.attention.wq.weight is in the checkpoint but not in the model" in message
    assert "norm.weight has shape (64,) in the checkpoint, (65,) in the model" in message
    assert "\n" not in message
    assert target["output.weight"].isnan().all()


def _edit_table(change):
    """Change one tensor's entry, and make the manifest agree."""

    def breaks(folder):
        table = json.loads((folder / TABLE).read_text())
        change(table["output.weight"])
        (folder / TABLE).write_text(json.dumps(table))
        write_manifest(folder)

    return breaks


def _flip_bit(folder):
    path = folder / TABLE
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
    "a manifest of the future": (_manifest(lambda m: m.update(format_version=3)), "format_version=3"),
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
    "a changed table": (_flip_bit, "tensors.json is corrupt"),
    "changed metadata": (lambda folder: (folder / ".metadata").write_bytes(b"x"), ".metadata has 1 bytes"),
    "a table that is not listed": (
        _manifest(lambda m: m["files"].pop(TABLE)),
        "tensors.json is not in the manifest",
    ),
    "a table of the wrong type": (
        lambda folder: ((folder / TABLE).write_text("[1]"), write_manifest(folder)),
        "tensors.json is not the table of a checkpoint",
    ),
    "a chunk in another folder": (
        _edit_table(lambda one: one["chunks"][0].__setitem__(0, "../../etc/passwd")),
        "'../../etc/passwd', which is not in the manifest",
    ),
    "a chunk beyond its file": (_edit_table(lambda one: one["chunks"][0].__setitem__(1, 1 << 40)), "is outside"),
    "a chunk before its file": (_edit_table(lambda one: one["chunks"][0].__setitem__(1, -1)), "is outside"),
    "a chunk that is missing": (_edit_table(lambda one: one["chunks"].pop()), "output.weight is incomplete"),
    "a chunk that is there twice": (
        _edit_table(lambda one: one["chunks"].insert(0, one["chunks"][0])),
        "output.weight has a gap or an overlap at 0",
    ),
    "a chunk of a fifth number": (_edit_table(lambda one: one["chunks"][0].append(1)), "is not the table"),
    "a dtype that is none": (_edit_table(lambda one: one.update(dtype="object")), "KeyError: 'object'"),
    "a dim that is none": (_edit_table(lambda one: one.update(dim=2)), "is cut along dim 2"),
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
        load(target, copy)
    assert "\n" not in str(error.value)
    assert all(tensor.isnan().all() for tensor in target.values())


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_nothing_is_unpickled(made, copy, file, tmp_path):
    """PyTorch's reader would unpickle both."""
    proof = tmp_path / "proof"
    evil = pickle.dumps(Evil(proof))
    if file == ".metadata":
        (copy / file).write_bytes(evil)
    else:
        data = bytearray((copy / file).read_bytes())
        first = torch_dcp.FileSystemReader(made[1]).read_metadata().storage_data.values()
        offset = min(info.offset for info in first)
        data[offset : offset + len(evil)] = evil
        (copy / file).write_bytes(data)
    write_manifest(copy)
    target = blank(made[0])
    load(target, copy)
    assert not proof.exists()
    assert all(torch.equal(target[name], tensor) for name, tensor in made[0].items())


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
