"""Joining alone, and waiting for ranks that do not come. What takes ranks is in tests/distributed/test_meet.py."""

from __future__ import annotations

import logging

import pytest
import torch.distributed as dist

from llama_tp.parallel import launch
from llama_tp.parallel.comm import SingleComm
from tests.waiting import SleepersClock

pytestmark = pytest.mark.usefixtures("no_torchrun")


def test_a_process_alone_joins_a_group_of_one():
    group = launch.join("cpu")
    assert isinstance(group.comm, SingleComm)
    assert group.mesh is None


def test_a_world_size_without_torchrun_is_refused_with_the_remedy(monkeypatch):
    """It waited for ever for ranks that nobody had started."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=2 is set .* unset WORLD_SIZE, or .*torchrun --nproc-per-node 2"):
        launch.join("cpu")


def test_ranks_that_do_not_start_are_named_while_the_others_wait_and_when_they_give_up(monkeypatch, caplog):
    monkeypatch.setattr(launch, "time", SleepersClock())
    monkeypatch.setattr(launch, "_MEET_TIMEOUT_S", 0.5)
    monkeypatch.setattr(launch, "_REPORT_AFTER_S", 0.1)
    store = dist.HashStore()
    store.set("here 2", b"1")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"ranks \[1, 3\] did not start"):
        launch._await_all(store, 0, 4)
    assert caplog.messages[0] == "rank 0 of 4 is waiting for ranks [1, 3] to start"


def test_the_store_of_one_host_is_a_private_file(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    store = launch._host_store(1)
    store.set("key", b"value")
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert [file.name.startswith(f"{launch.os.getppid()}.") for file in folder.iterdir()] == [True]


def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"llama_tp.{launch.os.getuid()}.ranks"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="must be a private folder that you own"):
        launch._host_store(1)


def test_the_files_of_ranks_that_were_killed_do_not_pile_up(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"llama_tp.{launch.os.getuid()}.ranks"
    folder.mkdir(mode=0o700)
    old, new = folder / "1.1.0", folder / "2.2.0"
    for file in (old, new):
        file.touch()
    launch.os.utime(old, (0, 0))
    launch._host_store(1)
    assert not old.exists()
    assert new.exists()
