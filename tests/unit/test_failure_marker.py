"""A model that cannot be loaded is not read again and again, and is read at once when anything has changed."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llama_tp.checkpoint.convert import convert
from llama_tp.engine import startup
from llama_tp.parallel.agreement import TransientError, is_permanent
from llama_tp.text.siblings import SIBLINGS
from llama_tp.text.tokenizer_files import copy_tokenizer
from llama_tp.torchserve import failure_marker, worker
from llama_tp.torchserve.failure_marker import FailureMarker
from llama_tp.torchserve.worker import load_rank
from tests import tiny_text
from tests.tiny_checkpoint import meta_tensors, write_meta

CONFIG = {
    "deviceType": "cpu",
    "handler": {"converted_ckpt_dir": "converted", "tokenizer_path": "tokenizer.json", "model_args_path": "args.json"},
}
AGAIN = " (as before; nothing has changed since)"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch, no_torchrun):
    """Markers of this test alone, also of files that were written a moment ago."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(failure_marker, "_SETTLED_S", -1.0)


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    (folder / "converted").mkdir(parents=True)
    for name in ("converted/manifest.json", "converted/chunk.0", "args.json", "tokenizer.json", *SIBLINGS):
        (folder / name).write_text("{}")
    return folder


def recalled(model_dir: Path, config: object = CONFIG) -> str | None:
    return FailureMarker(config, model_dir).recall()


@pytest.fixture
def failed(model_dir):
    """A model folder with a marker."""
    FailureMarker(CONFIG, model_dir).remember("it is damaged")
    assert recalled(model_dir) == "it is damaged"
    return model_dir


def test_without_a_marker_nothing_is_recalled(model_dir):
    assert recalled(model_dir) is None


def rewritten(path: Path) -> None:
    """The same content, size and time of modification."""
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(copy, path)


FILES = ("converted/manifest.json", "converted/chunk.0", "args.json", "tokenizer.json", *SIBLINGS)


@pytest.mark.parametrize("change", [rewritten, replaced, Path.unlink, Path.touch], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FILES)
def test_any_change_of_a_file_makes_the_next_attempt_a_real_one(failed, name, change):
    time.sleep(0.02)  # more than the resolution of a file's times
    change(failed / name)
    assert recalled(failed) is None


def test_a_new_file_in_the_checkpoint_makes_the_next_attempt_a_real_one(failed):
    (failed / "converted" / "chunk.1").touch()
    assert recalled(failed) is None


@pytest.mark.parametrize(
    "change", [{"deviceType": "gpu"}, {"handler": {**CONFIG["handler"], "max_seq_len": 7}}, {"x": 1}]
)
def test_any_change_of_the_configuration_makes_the_next_attempt_a_real_one(failed, change):
    assert recalled(failed, {**CONFIG, **change}) is None
    assert recalled(failed) is not None


def test_another_model_folder_has_a_marker_of_its_own(failed, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(failed)
    assert recalled(other) is not None  # the same folder by another name
    other.unlink()
    other.mkdir()
    assert recalled(other) is None


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LLAMA_TP_CACHE", "NCCL_DEBUG"])
def test_a_variable_that_counts_makes_the_next_attempt_a_real_one(failed, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert recalled(failed) is None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "MASTER_PORT"])
def test_what_differs_between_ranks_and_attempts_does_not_count(failed, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert recalled(failed) is not None


def test_another_version_or_other_code_makes_the_next_attempt_a_real_one(failed, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(failure_marker, "version", lambda name: "99")
        assert recalled(failed) is None
    with monkeypatch.context() as patch:
        patch.setattr(failure_marker, "_PACKAGE", tmp_path)
        assert recalled(failed) is None
    with monkeypatch.context() as patch:
        patch.setattr(failure_marker, "_memory", lambda: "MemTotal: 1 kB")
        assert recalled(failed) is None
    assert recalled(failed) is not None


def test_a_marker_is_believed_for_a_quarter_of_an_hour_and_not_from_the_future(failed, monkeypatch):
    now = json.loads(marker_file(failed).read_bytes())["time"]
    for age, is_believed in ((600, True), (899, True), (901, False), (-60, False)):
        monkeypatch.setattr(time, "time", lambda age=age: now + age)
        assert (recalled(failed) is not None) is is_believed, age


def marker_file(model_dir: Path) -> Path:
    return FailureMarker(CONFIG, model_dir).path


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"key": 1}', b"[" * 100_000])
def test_a_damaged_marker_counts_as_none(failed, content):
    marker_file(failed).write_bytes(content)
    assert recalled(failed) is None
    FailureMarker(CONFIG, failed).remember("again")
    assert recalled(failed) == "again"


def test_a_marker_far_larger_than_any_reason_counts_as_none(failed):
    with open(marker_file(failed), "a") as file:
        file.write(" " * 70_000)
    assert recalled(failed) is None


@pytest.mark.parametrize("field", ["key", "reason", "time"])
def test_a_marker_that_lacks_a_field_or_has_it_wrong_counts_as_none(failed, field):
    path = marker_file(failed)
    whole = json.loads(path.read_text())
    for value in (None, [1], "", {"a": 1}):
        path.write_text(json.dumps({**whole, field: value}))
        assert recalled(failed) is None or (field, value) == ("reason", "")
    del whole[field]
    path.write_text(json.dumps(whole))
    assert recalled(failed) is None


def test_a_folder_that_others_can_write_to_is_not_believed(failed):
    folder = marker_file(failed).parent
    folder.chmod(0o777)
    assert recalled(failed) is None
    folder.chmod(0o700)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    assert recalled(failed) is None


def test_without_a_place_for_it_there_is_no_marker_and_no_error(model_dir, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    FailureMarker(CONFIG, model_dir).remember("it is damaged")
    assert recalled(model_dir) is None
    FailureMarker(CONFIG, model_dir).forget()


def test_a_file_written_just_before_the_attempt_leaves_no_verdict(model_dir, monkeypatch):
    """It could be written again within the resolution of its times."""
    monkeypatch.setattr(failure_marker, "_SETTLED_S", 3600.0)
    FailureMarker(CONFIG, model_dir).remember("it is damaged")
    monkeypatch.setattr(failure_marker, "_SETTLED_S", -1.0)
    assert recalled(model_dir) is None


def test_a_change_during_the_attempt_makes_the_next_one_a_real_one(model_dir):
    marker = FailureMarker(CONFIG, model_dir)
    (model_dir / "args.json").write_text("{ }")
    marker.remember("it is damaged")
    assert recalled(model_dir) is None


def test_ranks_that_fail_together_leave_one_sound_marker(model_dir):
    markers = [FailureMarker(CONFIG, model_dir) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda marker: marker.remember("it is damaged"), markers))
            assert recalled(model_dir) == "it is damaged"
    assert [path.name for path in marker_file(model_dir).parent.iterdir()] == [marker_file(model_dir).name]


@pytest.mark.parametrize(
    "config", [None, [], "x", {"handler": 5}, {"handler": {"converted_ckpt_dir": 5}}, {1: 2, "a": None}]
)
def test_a_malformed_configuration_has_a_marker_too(model_dir, config):
    FailureMarker(config, model_dir).remember("malformed")
    assert recalled(model_dir, config) == "malformed"
    assert recalled(model_dir) is None


def test_a_folder_of_far_too_many_files_has_no_marker(model_dir, monkeypatch):
    """Such as the root folder, which nobody wants to walk at every start."""
    monkeypatch.setattr(failure_marker, "_MAX_FILES", 12)
    for number in range(20):
        (model_dir / "converted" / f"chunk.{number}").touch()
    FailureMarker(CONFIG, model_dir).remember("it is damaged")
    assert recalled(model_dir) is None


# --- which failures are permanent


def raised(raise_it) -> Exception:
    try:
        raise_it()
    except Exception as error:
        return error
    raise AssertionError


def value_error_of_an_io_error() -> None:
    try:
        Path("/nowhere").read_text()
    except OSError:
        raise ValueError("cannot read") from None


def value_error_of_too_little_memory() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except RuntimeError as error:
        raise ValueError("does not fit") from error


@pytest.mark.parametrize(
    ("raise_it", "permanent"),
    [
        (lambda: int("x"), True),
        (lambda: json.loads("{"), True),
        (lambda: Path("/nowhere").read_text(), False),
        (value_error_of_an_io_error, False),
        (value_error_of_too_little_memory, False),
        (lambda: bytearray(1 << 62), False),
    ],
)
def test_only_the_users_errors_are_permanent(raise_it, permanent):
    assert is_permanent(raised(raise_it)) is permanent
    assert not is_permanent(TransientError("another rank exited"))


def test_memory_that_others_use_may_be_freed_and_memory_that_is_not_there_may_not(monkeypatch):
    def needs(wanted):
        def check(available):
            if wanted > available:
                raise ValueError(f"only {available} are free")
            return "fits"

        return lambda: startup._in_memory(check, torch.device("cpu"))

    monkeypatch.setattr(startup, "free_memory", lambda device: 10)
    monkeypatch.setattr(startup, "total_memory", lambda device: 100)
    assert needs(10)() == "fits"
    for wanted, permanent in ((11, False), (100, False), (101, True)):
        error = raised(needs(wanted))
        assert str(error) == "only 10 are free"
        assert is_permanent(error) is permanent


# --- a rank


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_meta(folder / "originals", meta_tensors(), 1)
    words = tiny_text.make_sentencepiece_model(folder / "originals")
    convert(str(folder / "originals"), str(words), 1, str(folder / "converted"), 128, 4, str(folder / "args.json"))
    copy_tokenizer(words, folder)
    return folder


@pytest.fixture
def load(converted, monkeypatch, caplog):
    """Load the rank of a plain process. Counts how often the model is read."""
    attempts = []
    real = worker.load_engine

    def load_engine(*args):
        attempts.append(args)
        return real(*args)

    monkeypatch.setattr(worker, "load_engine", load_engine)
    caplog.set_level(logging.INFO)
    config = {
        "deviceType": "cpu",
        "parallelType": "tp",
        "continuousBatching": True,
        "torchrun": {"nproc-per-node": 1, "rdzv-endpoint": "localhost:0"},
        "handler": {"max_new_tokens": 8, "kv_cache_memory": "64MiB", "tokenizer_path": "tokenizer.model"}
        | {"converted_ckpt_dir": "converted", "model_args_path": "args.json"},
    }

    def load(**handler):
        load_rank(lambda: {**config, "handler": {**config["handler"], **handler}}, converted, lead=True)

    load.attempts = attempts
    return load


@pytest.fixture
def damaged(converted):
    """A chunk of the checkpoint with one byte changed. Yields what repairs it."""
    chunk = max((converted / "converted").iterdir(), key=lambda path: path.stat().st_size)
    sound = chunk.read_bytes()
    chunk.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    yield lambda: chunk.write_bytes(sound)
    chunk.write_bytes(sound)


def test_a_damaged_model_is_read_once_until_it_is_repaired(load, damaged, caplog):
    with pytest.raises(RuntimeError) as first:
        load()
    for _ in range(3):
        with pytest.raises(RuntimeError) as later:
            load()
        assert str(later.value) == f"{first.value}{AGAIN}"
    assert len(load.attempts) == 1
    assert f"the model was not loaded: {first.value}{AGAIN}" in caplog.messages
    assert any(message.startswith("not reading the model again: in 0.") for message in caplog.messages)
    damaged()
    load()
    assert len(load.attempts) == 2
    load()
    assert len(load.attempts) == 3


def test_a_mistake_in_the_configuration_is_told_again_until_it_is_corrected(load):
    for suffix in ("", AGAIN):
        with pytest.raises(RuntimeError, match=r"max_batch_size.*") as caught:
            load(max_batch_size="many")
        assert str(caught.value).endswith(AGAIN) is bool(suffix)
    load()


@pytest.mark.parametrize(
    "error", [OSError("disk"), RuntimeError("CUDA"), TransientError("a rank exited"), KeyError("x")]
)
def test_a_failure_that_may_go_away_by_itself_is_no_verdict(load, monkeypatch, error):
    def fail(*_):
        load.attempts.append(error)
        raise error

    monkeypatch.setattr(worker, "load_engine", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            load()
        assert AGAIN not in str(caught.value)
    assert len(load.attempts) == 2


def test_all_hosts_try_again_when_the_files_of_one_have_changed(load, damaged, monkeypatch):
    with pytest.raises(RuntimeError):
        load()
    monkeypatch.setattr(worker, "gather", lambda reason: [reason, None])
    with pytest.raises(RuntimeError) as caught:
        load()
    assert AGAIN not in str(caught.value)
    assert len(load.attempts) == 2


def test_a_model_that_was_loaded_leaves_no_marker(load, damaged, converted):
    with pytest.raises(RuntimeError):
        load()
    assert marker_file(converted).exists()
    damaged()
    load()
    assert not marker_file(converted).exists()
