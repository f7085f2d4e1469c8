"""A conversion by several ranks gives what one process gives, and ends on all ranks when one cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.reading import StoredFiles, load
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.checkpoint.store.verify import verify
from tests.distributed.torchrun import TIMEOUT_S, check, torchrun
from tests.hub_stand_in import serving, variables
from tests.paths import ROOT, names_in
from tests.tiny_checkpoint import ARGS, flip_bit, meta_tensors, write_checklist, write_meta
from tests.tiny_gguf import write_gguf
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_mistral import write_mistral
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json

pytestmark = pytest.mark.distributed
WORKER = "tests.distributed.convert_worker"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_sentencepiece_model(folder)
    return write_meta(folder, meta_tensors(), 2)


def settings(originals, folder):
    return {
        "original_ckpt_dir": str(originals),
        "tokenizer_path": str(originals / "tokenizer.model"),
        "model_parallel_size": 2,
        "save_checkpoint_dir": str(folder / "converted"),
        "max_seq_len": 512,
        "max_batch_size": 2,
        "model_args_path": str(folder / "model_args.json"),
    }


def arguments(originals, folder, **changes):
    values = {**settings(originals, folder), **changes}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def run_script(nproc, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(nproc)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "scripts/convert_checkpoints.py", *args]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def bytes_by_file(folder):
    """Bytes of tensors, without the wrapping of each chunk."""
    sizes = Counter()
    for tensor in StoredFiles(folder).tensors.values():
        for chunk in tensor.chunks:
            sizes[chunk.file] += tensor.chunk_bytes(chunk)
    return sizes.values()


def our_lines(done):
    return [
        line for line in done.stderr.splitlines() if line.startswith(("convert_checkpoints.py:", "convert_worker.py:"))
    ]


@pytest.mark.parametrize("nproc", [1, 3])
def test_the_command_of_the_readme_works_with_any_number_of_ranks(originals, tmp_path, nproc):
    done = run_script(nproc, *arguments(originals, tmp_path))
    check(done)
    assert done.stdout.count("Wrote") == 1
    assert names_in(tmp_path) == ["converted", "model_args.json"]
    folder = tmp_path / "converted"
    verify(folder)
    files = sorted(folder.glob("*.distcp"))
    assert [path.name for path in files] == [f"__{rank}_0.distcp" for rank in range(nproc)]
    shares = bytes_by_file(folder)
    assert max(shares) < 1.1 * min(shares)
    tensors = meta_tensors()
    target = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    load(target, folder)
    assert all(torch.equal(target[name], tensors[name]) for name in tensors)


def write_hugging_face(folder):
    make_tokenizer_json(save(tiny_model("qwen2"), folder))


def write_mistral_ais(folder):
    write_mistral(folder, tiny_model("mistral"))
    make_sentencepiece_model(folder).rename(folder / "tokenizer.model.v3")


def write_metas(folder):
    write_meta(folder, meta_tensors(), 4)
    make_sentencepiece_model(folder)


SOURCES = {
    "meta": write_metas,
    "hugging_face": write_hugging_face,
    "mistral": write_mistral_ais,
    "a.gguf": write_gguf,
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_script_converts_every_format_without_the_optional_flags(tmp_path, source):
    SOURCES[source](tmp_path / source)
    paths = [f"--save_checkpoint_dir={tmp_path / 'converted'}", f"--model_args_path={tmp_path / 'model_args.json'}"]
    done = run_script(2, f"--original_ckpt_dir={tmp_path / source}", *paths)
    check(done)
    assert names_in(tmp_path) == sorted([source, "converted", "model_args.json"])
    assert (tmp_path / "model_args.json").read_text() == (tmp_path / "converted" / "model_args.json").read_text()
    verify(tmp_path / "converted")
    found, expected = StoredReader(tmp_path / "converted"), open_checkpoint(tmp_path / source)
    assert len(found.files) == 2
    assert found.args == expected.args
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].read(0, 0, tensor.shape[0]), tensor.read(0, 0, tensor.shape[0])), name


def test_one_rank_downloads_a_model_of_the_hub_for_all(originals, tmp_path):
    files = {f"original/{path.name}": path.read_bytes() for path in originals.iterdir()}
    with serving({"tiny/llama": files}) as hub:
        environment = variables(hub.server_port, tmp_path / "home") | {"no_proxy": "127.0.0.1"}

        def convert_from_hub(source):
            options = [str(tmp_path / "converted"), f"--download_dir={tmp_path / 'model'}"]
            return torchrun(2, "llama_tp", "convert", source, *options, env=environment)

        misspelt = convert_from_hub("tiny/lama")
        done = convert_from_hub("tiny/llama")
    assert misspelt.returncode != 0
    assert misspelt.stderr.count("tiny/lama was not found") == 1, misspelt.stderr
    check(done)
    assert sorted(name for name in hub.fetched() if name in files) == sorted(files)
    verify(tmp_path / "converted")
    assert len(list((tmp_path / "converted").glob("*.distcp"))) == 2


def test_a_failed_check_ends_all_ranks_with_one_line_from_one_of_them(originals, tmp_path):
    done = run_script(2, *arguments(originals, tmp_path, model_parallel_size=4))
    assert done.returncode != 0
    assert len(our_lines(done)) == 1, done.stderr
    assert "pass --model_parallel_size 2" in our_lines(done)[0]
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_original_is_found_by_the_rank_that_hashes_it(originals, tmp_path, shard):
    damaged = shutil.copytree(originals, tmp_path / "damaged")
    write_checklist(damaged)
    flip_bit(damaged / f"consolidated.0{shard}.pth", 50_000)
    done = run_script(2, *arguments(damaged, tmp_path))
    assert done.returncode != 0
    assert len(our_lines(done)) == 1, done.stderr
    assert f"consolidated.0{shard}.pth is damaged or is another file" in our_lines(done)[0]
    assert names_in(tmp_path) == ["damaged"]


FAULTS = {"a full disk on rank 1": "File too large", "an unreadable shard on rank 1": "not readable"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_only_one_rank_meets_ends_all_with_one_line_and_leaves_nothing(originals, tmp_path, fault):
    done = torchrun(2, WORKER, fault, *arguments(originals, tmp_path))
    assert done.returncode != 0
    assert len(our_lines(done)) == 1, done.stderr
    assert {"a full disk on rank 1": "File too large", "an unreadable shard on rank 1": "not readable"}[
        fault
    ] in our_lines(done)[0]
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_a_rerun_succeeds(originals, tmp_path, rank):
    start = time.monotonic()
    done = torchrun(2, WORKER, f"kill rank {rank}", *arguments(originals, tmp_path))
    assert done.returncode != 0
    assert time.monotonic() - start < 200, "it has waited for the one that was killed"
    assert not (tmp_path / "converted").exists()
    convert(**settings(originals, tmp_path))
    verify(tmp_path / "converted")
    assert names_in(tmp_path) == ["converted", "model_args.json"]


def test_two_ranks_load_their_slices_through_dtensor_and_fail_together(originals, tmp_path):
    convert(**settings(originals, tmp_path))
    check(torchrun(2, "tests.distributed.dcp_worker", str(tmp_path / "converted")))


def test_the_ranks_of_a_host_share_the_hashing_of_a_load_and_all_hear_of_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "FILE_BYTES", 60_000)
    folder = tmp_path / "converted"
    folder.mkdir()
    write_manifest(folder, known=dcp.save(MemoryReader.of(ARGS, meta_tensors()), folder))
    assert len(list(folder.glob("*.distcp"))) > 3
    check(torchrun(2, "tests.distributed.load_verification_worker", str(folder)))
