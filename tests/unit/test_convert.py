"""A conversion is whole or absent, whatever happens to it, and says in one line what was wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from llama_tp.checkpoint import convert as convert_module
from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.manifest import load_manifest
from llama_tp.checkpoint.store.reading import load
from llama_tp.checkpoint.store.staging import StagedFolder
from llama_tp.checkpoint.store.verify import verify
from llama_tp.cli.command import run_command
from llama_tp.model_args import ModelArgs
from llama_tp.text import load_tokenizer
from tests.paths import names_in
from tests.tiny_checkpoint import PARAMS, flip_bit, meta_tensors, write_checklist, write_meta
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_sentencepiece_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def job(tmp_path, tokenizer, monkeypatch):
    """The arguments of a conversion that works, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path / "originals", meta_tensors(), 2)
    return {
        "original_ckpt_dir": str(tmp_path / "originals"),
        "tokenizer_path": str(tokenizer),
        "model_parallel_size": 2,
        "save_checkpoint_dir": "converted_checkpoints",
        "max_seq_len": 512,
        "max_batch_size": 2,
    }


def load_all(folder):
    target = {name: torch.full_like(tensor, float("nan")) for name, tensor in meta_tensors().items()}
    load(target, folder)
    return target


def test_the_checkpoint_and_model_args_are_there_and_nothing_else(job, tmp_path, capsys):
    convert(**job)
    assert names_in(tmp_path) == ["converted_checkpoints", "model_args.json", "originals"]
    folder = tmp_path / "converted_checkpoints"
    weights, others = (
        [".metadata", "__0_0.distcp", "tensors.json"],
        ["manifest.json", "model_args.json", "tokenizer.model"],
    )
    assert names_in(folder) == sorted(weights + others)
    args = ModelArgs.load(tmp_path / "model_args.json")
    assert args == ModelArgs.load(folder / "model_args.json")
    assert (args.max_seq_len, args.max_batch_size, args.vocab_size) == (512, 2, 512)
    verify(folder)
    assert load_manifest(folder).files.keys() == {*weights, "model_args.json", "tokenizer.model"}
    assert load_manifest(folder).about["dtype"] == "bfloat16"
    captured = capsys.readouterr()
    assert "converted_checkpoints" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_the_checkpoint_keeps_the_tokenizer_with_all_that_belongs_to_it(job, tmp_path, as_folder):
    words = tmp_path / "words"
    words.mkdir()
    path = make_tokenizer_json(words)
    for name in ("special_tokens_map.json", "generation_config.json"):
        (words / name).write_text("{}")
    (words / "chat_template.jinja").write_text("é")
    (words / "unrelated.json").write_text("{}")
    expected = {path.name: path.read_bytes() for path in words.iterdir() if path.name != "unrelated.json"}
    convert(**{**job, "tokenizer_path": str(words if as_folder else path)})
    folder = tmp_path / "converted_checkpoints"
    assert len(expected) == 5
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert not (folder / "unrelated.json").exists()
    assert expected.keys() < load_manifest(folder).files.keys()
    assert load_tokenizer(folder).chat_template == "é"


def test_a_tokenizer_of_any_name_is_found_in_the_checkpoint(job, tmp_path, tokenizer):
    other = tmp_path / "originals" / "llama2.spm"
    other.write_bytes(tokenizer.read_bytes())
    convert(**{**job, "tokenizer_path": str(other)})
    assert (tmp_path / "converted_checkpoints" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_a_pad_token_beyond_the_embedding_is_no_reason_to_refuse_a_tokenizer(job, tmp_path):
    path = make_tokenizer_json(tmp_path / "originals")
    size = load_tokenizer(path).vocab_size
    definition = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    contents = [f"<|filler {i}|>" for i in range(size, 512)] + ["<pad>"]
    definition["added_tokens"] += [
        {"id": size + i, "content": c, "special": True, **flags} for i, c in enumerate(contents)
    ]
    path.write_text(json.dumps(definition))
    convert(**{**job, "tokenizer_path": str(path)})
    assert load_tokenizer(tmp_path / "converted_checkpoints").special_ids["<pad>"] == 512  # of 512 rows


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama3", "llama2"])
def test_any_number_of_shards_gives_the_same_checkpoint(job, tmp_path, embedding_dim):
    tensors = meta_tensors()
    for num_shards in (1, 2, 4):
        write_meta(tmp_path / f"m{num_shards}", tensors, num_shards, embedding_dim=embedding_dim)
        job |= {"original_ckpt_dir": f"m{num_shards}", "model_parallel_size": num_shards}
        convert(**job | {"save_checkpoint_dir": f"c{num_shards}"})
        loaded = load_all(tmp_path / f"c{num_shards}")
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    first = {entry.sha256 for entry in load_manifest("c1").files.values()}
    assert {entry.sha256 for entry in load_manifest("c4").files.values()} == first


def test_the_source_is_left_as_it_was(job, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "originals").iterdir()}
    convert(**job)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "originals").iterdir()}
    assert after == before


def _shrink_vocabulary(job, folder):
    tensors = meta_tensors()
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:128].clone()
    write_meta(folder / "originals", tensors, 2, params={**PARAMS, "vocab_size": -1})


REFUSED = {
    "another number of shards": (lambda job, _: job.update(model_parallel_size=1), "pass --model_parallel_size 2"),
    "a number of shards that is none": (lambda job, _: job.update(model_parallel_size="two"), "must be an integer"),
    "no originals": (lambda job, _: job.update(original_ckpt_dir="nowhere"), "nowhere is not a folder"),
    "no tokenizer": (lambda job, _: job.update(tokenizer_path="nowhere.model"), "nowhere.model"),
    "a tokenizer of another model": (_shrink_vocabulary, "has 128 rows: the tokenizer is not this model's"),
    "a limit that is none": (lambda job, _: job.update(max_seq_len=0), "max_seq_len=0"),
    "nowhere to put model_args": (lambda job, _: job.update(model_args_path="nowhere/a.json"), "nowhere"),
    "an existing destination": (
        lambda _, folder: (folder / "converted_checkpoints" / "mine").mkdir(parents=True),
        "pass --overwrite",
    ),
    "overwriting what is not ours": (
        lambda job, folder: ((folder / "converted_checkpoints/mine").mkdir(parents=True), job.update(overwrite=True)),
        "is not overwritten",
    ),
    "a destination that is a file": (lambda _, folder: (folder / "converted_checkpoints").touch(), "is not a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_one_line_and_nothing_is_written(job, tmp_path, case):
    breaks, words = REFUSED[case]
    breaks(job, tmp_path)
    before = names_in(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        convert(**job)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == before


@contextmanager
def full_disk():
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_nothing_is_left(job, tmp_path):
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=r"cannot write to .*File too large") as error, full_disk():
        convert(**job)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == before
    convert(**job)


def test_too_little_space_is_found_before_anything_is_written(job, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=r"0\.0 GB free, but the checkpoint needs"):
        convert(**job)
    assert names_in(tmp_path) == before


def test_a_second_conversion_to_the_same_place_is_refused_while_the_first_runs(job, tmp_path):
    first = StagedFolder(tmp_path / "converted_checkpoints")
    first.begin()
    with pytest.raises(ValueError, match="another process is writing"):
        convert(**job)
    assert first.path.is_dir()
    first.discard()
    convert(**job)
    assert names_in(tmp_path) == ["converted_checkpoints", "model_args.json", "originals"]


def _killed_in(function, monkeypatch_target, name, after=False):
    """Run a function in a child that is killed at (or right after) its first call of a method."""
    child = os.fork()
    if child == 0:
        original = getattr(monkeypatch_target, name)

        def killed(*args, **kwargs):
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(monkeypatch_target, name, killed)
        try:
            function()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.WIFSIGNALED(done[1])
    assert os.WTERMSIG(done[1]) == signal.SIGKILL


KILL_POINTS = {
    "before the first byte": (HashingFile, "__enter__", False, False),
    "in the weights": (HashingFile, "_write", True, False),
    "after the weights": (HashingFile, "__exit__", True, False),
    "before the manifest": (convert_module, "write_manifest", False, False),
    "after the manifest": (convert_module, "write_manifest", True, False),
    "before the rename": (StagedFolder, "commit", False, False),
    "after the rename": (StagedFolder, "commit", True, True),
    "before model_args.json": (convert_module, "replace_file", False, True),
}


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_any_point_the_destination_is_absent_or_whole_and_a_rerun_succeeds(job, tmp_path, point):
    target, name, after, is_there = KILL_POINTS[point]
    _killed_in(lambda: convert(**job), target, name, after)
    destination = tmp_path / "converted_checkpoints"
    assert destination.exists() == is_there
    if is_there:
        verify(destination)
    convert(**job, overwrite=is_there)
    verify(destination)
    assert names_in(tmp_path) == ["converted_checkpoints", "model_args.json", "originals"]


@pytest.mark.parametrize("point", [*KILL_POINTS, "before the old one is removed"])
def test_killed_while_overwriting_the_old_or_the_new_one_is_there_whole(job, tmp_path, point):
    convert(**job)
    old, new = meta_tensors(), meta_tensors(seed=1)
    write_meta(tmp_path / "originals", new, 2)
    target, name, after, is_new = KILL_POINTS.get(point, (StagedFolder, "discard", False, True))
    _killed_in(lambda: convert(**job, overwrite=True), target, name, after)
    verify(tmp_path / "converted_checkpoints")
    expected = new if is_new else old
    loaded = load_all(tmp_path / "converted_checkpoints")
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    convert(**job, overwrite=True)
    assert torch.equal(load_all(tmp_path / "converted_checkpoints")["norm.weight"], new["norm.weight"])
    assert names_in(tmp_path) == ["converted_checkpoints", "model_args.json", "originals"]


def test_a_swap_that_was_killed_on_a_file_system_without_one_is_repaired(job, tmp_path):
    convert(**job)
    (tmp_path / "converted_checkpoints").rename(tmp_path / ".converted_checkpoints.old")
    with pytest.raises(ValueError, match="pass --overwrite"):
        convert(**job)
    verify(tmp_path / "converted_checkpoints")


def test_the_command_ends_with_one_line_and_code_1(job, capsys, monkeypatch):
    job["model_parallel_size"] = 4
    monkeypatch.setattr("sys.argv", ["scripts/convert.py", *(f"--{key}={value}" for key, value in job.items())])
    with pytest.raises(SystemExit) as end:
        run_command(convert)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("convert.py: model_parallel_size=4 but ")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def listed_job(job, tmp_path):
    """A conversion of originals with a checklist beside them, in which files have a folder, as in Meta's own."""
    write_checklist(tmp_path / "originals", prefix="./llama-2-7b/")
    return job


def test_originals_that_match_their_checklist_are_converted_and_that_is_said(listed_job, tmp_path, capsys):
    convert(**listed_job)
    assert "the originals match checklist.chk" in capsys.readouterr().out
    assert torch.equal(load_all(tmp_path / "converted_checkpoints")["norm.weight"], meta_tensors()["norm.weight"])


def _swap_shards(folder):
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


DAMAGED = {
    "a flipped bit": (lambda folder: flip_bit(folder / "consolidated.01.pth", 50_000), "consolidated.01.pth"),
    "shards in the wrong order": (_swap_shards, "consolidated.0"),
    "other params": (
        lambda folder: (folder / "params.json").write_text(json.dumps({**PARAMS, "norm_eps": 1e-6})),
        "params.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_originals_that_are_not_those_of_the_checklist_are_refused_by_name(listed_job, tmp_path, case):
    """All of these were converted, into models that talk nonsense or something a little wrong."""
    breaks, name = DAMAGED[case]
    breaks(tmp_path / "originals")
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged or is another file: its md5 is") as error:
        convert(**listed_job)
    assert str(tmp_path / "originals" / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_tokenizer_that_is_not_the_one_of_its_checklist_is_refused(job, tmp_path, as_folder):
    """Llama 2 ships tokenizer_checklist.chk for it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(job["tokenizer_path"], folder / "tokenizer.model")
    write_checklist(folder, name="tokenizer_checklist.chk")
    job["tokenizer_path"] = str(folder if as_folder else folder / "tokenizer.model")
    convert(**job)
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data + data[-3:])
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged or is another file"):
        convert(**job, overwrite=True)


def test_the_hashing_of_a_conversion_that_fails_ends_with_it(listed_job, tmp_path):
    with pytest.raises(ValueError, match="cannot write to"), full_disk():
        convert(**listed_job)
    assert not [thread for thread in threading.enumerate() if thread.name == "checklist"]


def test_model_args_says_what_params_said(job, tmp_path):
    params = {**PARAMS, "rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8.0, "vocab_size": -1}
    (tmp_path / "originals" / "params.json").write_text(json.dumps(params))
    convert(**job, model_args_path="elsewhere.json")
    args = ModelArgs.load("elsewhere.json")
    assert (args.rope_theta, args.vocab_size, args.norm_eps) == (500000.0, 512, 1e-5)
    assert args.rope_scaling is not None
