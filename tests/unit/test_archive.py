"""The folder that `llama-tp package` makes is one that TorchServe and the handler can load."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from llama_tp.config_error import ConfigError
from llama_tp.torchserve import archive
from llama_tp.torchserve.archive import build_archive
from tests.paths import ROOT, names_in

pytestmark = pytest.mark.skipif(
    not Path(sys.executable).with_name("torch-model-archiver").exists(), reason="needs torch-model-archiver: [serve]"
)


@pytest.fixture
def job(tmp_path):
    """The arguments of a build that works, with files of a few bytes for weights."""
    checkpoint = tmp_path / "converted"
    checkpoint.mkdir()
    for name in (".metadata", "__0_0.distcp", "manifest.json", "model_args.json"):
        (checkpoint / name).write_text(f"the bytes of {name}")
    (tmp_path / "tokenizer.model").write_bytes(b"\nwords")
    return {
        "model_name": "llama",
        "config_file": ROOT / "model-config.yaml",
        "checkpoint": checkpoint,
        "tokenizer": tmp_path / "tokenizer.model",
        "handler": ROOT / "handler" / "llama_handler.py",
        "model_store": tmp_path / "model_store",
    }


def write_config(folder, **handler):
    values = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    values["handler"].update(handler)
    path = folder / "my-config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_folder_holds_the_handler_its_configuration_and_the_model(job):
    folder = build_archive(**job)
    assert folder == job["model_store"] / "llama"
    assert names_in(folder) == [
        "MAR-INF",
        "converted_checkpoints",
        "llama_handler.py",
        "model-config.yaml",
        "model_args.json",
        "tokenizer.model",
    ]
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert manifest["modelName"] == "llama"
    assert manifest["modelVersion"] == "1.0"
    assert manifest["handler"] == "llama_handler.py"
    assert manifest["configFile"] == "model-config.yaml"
    assert (folder / "model-config.yaml").read_bytes() == job["config_file"].read_bytes()
    assert (folder / "llama_handler.py").read_bytes() == job["handler"].read_bytes()
    assert names_in(folder / "converted_checkpoints") == names_in(job["checkpoint"])
    for path in job["checkpoint"].iterdir():
        assert (folder / "converted_checkpoints" / path.name).read_bytes() == path.read_bytes()
    assert names_in(job["model_store"]) == ["llama"]


def test_weights_are_linked_and_not_copied(job):
    folder = build_archive(**job)
    assert os.path.samefile(folder / "converted_checkpoints" / "__0_0.distcp", job["checkpoint"] / "__0_0.distcp")


def test_weights_are_copied_where_links_are_impossible(job, monkeypatch):
    def refuse(*_, **__):
        raise OSError("cross-device link")

    monkeypatch.setattr(archive.os, "link", refuse)
    folder = build_archive(**job)
    assert (folder / "converted_checkpoints" / "__0_0.distcp").read_text() == "the bytes of __0_0.distcp"


def test_a_checkpoint_of_links_to_files_elsewhere_is_packaged_with_its_bytes(job, tmp_path):
    """As the hub's cache has it: a hard link to a relative link points nowhere."""
    stored = tmp_path / "blobs" / "weights"
    stored.parent.mkdir()
    shard = job["checkpoint"] / "__0_0.distcp"
    shard.rename(stored)
    shard.symlink_to("../blobs/weights")
    folder = build_archive(**job)
    assert (folder / "converted_checkpoints" / "__0_0.distcp").read_text() == "the bytes of __0_0.distcp"


def test_a_tokenizer_json_brings_its_chat_template_along(job, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "unrelated.json"):
        (tmp_path / name).write_text("{}")
    job["tokenizer"] = tmp_path / "tokenizer.json"
    job["config_file"] = write_config(tmp_path, tokenizer_path="tokenizer.json")
    present = names_in(build_archive(**job))
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= set(present)
    assert "unrelated.json" not in present


@pytest.mark.parametrize("given", [True, False], ids=["a folder", "by default"])
def test_the_tokenizer_of_a_checkpoint_is_its_default_and_brings_all_that_belongs_to_it(job, tmp_path, given):
    files = {
        "tokenizer.model": "words",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "x",
        "added_tokens.json": "{}",
    }
    for name, content in files.items():
        (job["checkpoint"] / name).write_text(content)
    del job["tokenizer"]
    folder = build_archive(**job, **({"tokenizer": job["checkpoint"]} if given else {}))
    for name, content in files.items():
        assert (folder / name).read_text() == content


def test_a_checkpoint_without_a_tokenizer_needs_one(job):
    del job["tokenizer"]
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        build_archive(**job)
    assert not job["model_store"].exists()


def test_an_older_folder_is_replaced_whole(job):
    first = build_archive(**job)
    (first / "stale").write_text("left over")
    (job["checkpoint"] / "__0_0.distcp").unlink()
    (job["checkpoint"] / "__1_0.distcp").write_text("new weights")
    second = build_archive(**job, version="2.0")
    assert second == first
    assert "stale" not in names_in(second)
    assert names_in(second / "converted_checkpoints") == names_in(job["checkpoint"])
    assert json.loads((second / "MAR-INF" / "MANIFEST.json").read_text())["model"]["modelVersion"] == "2.0"
    assert names_in(job["model_store"]) == ["llama"]


def test_another_checkpoint_is_deleted_only_on_request(job):
    """It may be the only copy: the README has users move it there."""
    build_archive(**job)
    (job["checkpoint"] / "manifest.json").unlink()  # it is linked
    (job["checkpoint"] / "manifest.json").write_text("of other weights")
    with pytest.raises(FileExistsError, match=r"llama contains another checkpoint, .* --overwrite to replace it"):
        build_archive(**job)
    folder = build_archive(**job, overwrite=True)
    assert (folder / "converted_checkpoints" / "manifest.json").read_text() == "of other weights"


def test_a_build_that_fails_leaves_the_older_folder_as_it_was(job, monkeypatch):
    folder = build_archive(**job)

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(archive.shutil, "copytree", fail)
    with pytest.raises(OSError, match="No space left"):
        build_archive(**job, version="2.0")
    assert json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]["modelVersion"] == "1.0"
    assert names_in(job["model_store"]) == ["llama"]


@pytest.mark.parametrize(
    "paths",
    [
        {"converted_ckpt_dir": "weights/of/llama"},
        {"tokenizer_path": "words/tokenizer.model"},
        {"model_args_path": "params/model_args.json"},
        {"model_args_path": None},
    ],
    ids=str,
)
def test_every_file_lies_where_the_configuration_says(job, tmp_path, paths):
    job["config_file"] = write_config(tmp_path, **paths)
    folder = build_archive(**job)
    handler = yaml.safe_load((folder / "my-config.yaml").read_text())["handler"]
    assert (folder / handler["converted_ckpt_dir"] / "model_args.json").is_file()
    assert (folder / handler["tokenizer_path"]).is_file()
    assert (folder / (handler["model_args_path"] or "model_args.json")).is_file()


@pytest.mark.parametrize("outside", ["/absolute/weights", "../weights", "."], ids=str)
def test_a_checkpoint_folder_outside_of_the_model_s_is_refused_before_anything_is_written(job, tmp_path, outside):
    if outside.startswith("/"):
        outside = str(tmp_path / "absolute")
    before = sorted(tmp_path.rglob("*"))
    job["config_file"] = write_config(tmp_path, converted_ckpt_dir=outside)
    with pytest.raises(ValueError, match="converted_ckpt_dir"):
        build_archive(**job)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, job["config_file"]])


@pytest.mark.parametrize("missing", ["tokenizer", "handler", "config_file", "checkpoint"])
def test_a_missing_file_is_named_before_anything_is_written(job, tmp_path, missing):
    job[missing] = tmp_path / "nowhere" / job[missing].name
    with pytest.raises((FileNotFoundError, ConfigError), match="nowhere"):
        build_archive(**job)
    assert not job["model_store"].exists()


def test_a_configuration_that_is_wrong_is_refused_before_anything_is_written(job, tmp_path):
    job["config_file"] = write_config(tmp_path, top_p=2)
    with pytest.raises(ConfigError, match=r"handler\.top_p"):
        build_archive(**job)
    assert not job["model_store"].exists()


def test_a_tokenizer_of_another_name_than_the_configuration_s_is_refused(job, tmp_path):
    job["config_file"] = write_config(tmp_path, tokenizer_path="tokenizer.json")
    with pytest.raises(ConfigError, match=r"'tokenizer\.json' but the tokenizer is 'tokenizer\.model'"):
        build_archive(**job)
    assert not job["model_store"].exists()


def test_what_the_archiver_says_is_passed_on_in_one_line(job):
    with pytest.raises(ValueError, match="torch-model-archiver failed: ") as caught:
        build_archive(**{**job, "model_name": "not a/name"})
    assert "\n" not in str(caught.value)
    assert names_in(job["model_store"]) == []


def test_a_missing_archiver_is_named_with_the_remedy(job, monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "program", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"pip install 'llama-tp\[serve\]'"):
        build_archive(**job)


def test_two_archives_of_one_name_do_not_share_the_archiver_s_folder(job, tmp_path, monkeypatch):
    """It works in TMPDIR/<model name>: what lay there already made it fail, and two of them mixed up their files."""
    (tmp_path / "tmp" / job["model_name"]).mkdir(parents=True)
    (tmp_path / "tmp" / job["model_name"] / "MAR-INF").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    folder = build_archive(**job)
    assert (folder / "MAR-INF" / "MANIFEST.json").is_file()
    assert names_in(tmp_path / "tmp" / job["model_name"]) == ["MAR-INF"]
    assert not (folder / ".scratch").exists()
