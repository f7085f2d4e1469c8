"""`llama-tp follow`: what is wrong is said in one line, before a group is joined or together with it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

import pytest
import yaml

from llama_tp.cli import main as cli
from llama_tp.config_error import ConfigError
from llama_tp.engine.loop import EXIT_STEP_FAILED
from llama_tp.parallel.comm import PeerLost
from llama_tp.torchserve import follower as follow_module
from llama_tp.torchserve import worker as start_module
from llama_tp.torchserve.config import ModelConfig
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("no_torchrun", "own_sigterm")


class Ended(Exception):
    """Instead of os._exit."""


@pytest.fixture
def two_hosts(monkeypatch, no_torchrun):
    """The environment of the rank of the second of two hosts."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def config_file(tmp_path):
    """Writes the shipped configuration with another torchrun section."""

    def write(**torchrun):
        values = yaml.safe_load((ROOT / "model-config.yaml").read_text())
        values["torchrun"].update({name.replace("_", "-"): value for name, value in torchrun.items()})
        path = tmp_path / "model-config.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


class FakeEngine:
    """Follows for no time, or until `error`."""

    def __init__(self, error=None):
        self.comm = self
        self.error = error
        self.closed = False

    def follow(self):
        if self.error:
            raise self.error

    def close(self):
        self.closed = True


class SameThread:
    def call(self, function):
        return function()


@pytest.fixture
def loaded(monkeypatch, two_hosts, caplog):
    """Makes a rank load at once with a fake engine."""
    caplog.set_level(logging.INFO)

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)

    def with_engine(engine):
        rank = start_module.LoadedRank(engine, SameThread(), config=None, tokenizer=None, chat="none")
        monkeypatch.setattr(follow_module, "load_rank", lambda read_yaml, model_dir, *, lead: rank)

    return with_engine


def test_without_torchrun_the_command_to_use_is_shown(config_file):
    path = config_file(nnodes=3, nproc_per_node=2, rdzv_endpoint="first-host:29555")
    with pytest.raises(ValueError, match="torchrun") as caught:
        follow_module.follow_leader(path)
    assert len(str(caught.value).splitlines()) == 1
    assert (
        "torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint first-host:29555 "
        f"--rdzv-id llama_29500 -m llama_tp follow --config {path} "
    ) in str(caught.value)


def test_a_torchrun_of_one_host_is_not_enough(config_file, monkeypatch, no_torchrun):
    path = config_file(nnodes=2, rdzv_endpoint="first-host:29555")
    for name in no_torchrun:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="--nnodes 2 "):
        follow_module.follow_leader(path)


def test_a_configuration_of_one_host_says_what_to_set(config_file):
    with pytest.raises(ConfigError, match=r"torchrun\.nnodes=1, .*set torchrun\.nnodes .* torchrun\.rdzv-endpoint"):
        follow_module.follow_leader(config_file())


@pytest.mark.parametrize(
    "endpoint", ["", "first-host", "first-host:0", ":29555", "first-host:", "first-host:http", "first-host:99999"]
)
def test_hosts_need_an_endpoint_where_they_can_meet(config_file, endpoint):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.load(config_file(nnodes=2, rdzv_endpoint=endpoint))
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"torchrun.rdzv-endpoint={json.dumps(endpoint)}: torchrun.nnodes=2 hosts rendezvous there; set HOST:PORT"
    )


@pytest.mark.parametrize("endpoint", ["first-host:29555", "10.0.0.1:1", "[fd00::1]:65535"])
def test_an_endpoint_with_a_port_is_enough(config_file, endpoint):
    assert ModelConfig.load(config_file(nnodes=2, rdzv_endpoint=endpoint)).torchrun.rdzv_endpoint == endpoint


def test_the_command_fails_in_one_line(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/llama-tp", "follow", "--config", config_file()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("llama-tp: ")
    assert err.count("\n") == 1
    assert "torchrun.nnodes=1" in err


def test_what_is_wrong_on_a_follower_is_logged_there_and_told_to_the_group(two_hosts, monkeypatch, caplog, tmp_path):
    """Only rank 0 prints the errors of a command, and a rank that left without a word would be waited for."""
    heard = []

    def agree(step):
        with pytest.raises(ConfigError) as caught:
            step()
        heard.append(str(caught.value))
        raise ValueError(f"rank 1: {caught.value}")

    monkeypatch.setattr(start_module, "meet", lambda: None)
    monkeypatch.setattr(start_module, "agree", agree)
    with pytest.raises(SystemExit) as caught:
        follow_module.follow_leader(str(tmp_path / "nowhere.yaml"))
    assert caught.value.code == 1
    assert heard == [f"{tmp_path / 'nowhere.yaml'} does not exist"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == f"the model was not loaded: rank 1: {heard[0]}"


def test_a_follower_whose_configuration_is_for_fewer_hosts_says_so(two_hosts, monkeypatch, config_file):
    path = config_file(nnodes=3, rdzv_endpoint="first-host:29555")
    config = ModelConfig.load(path)
    (problem,) = start_module._wrong_number_of_hosts(config)
    assert problem == "torchrun.nnodes=3, but torchrun started this group on 2 hosts; make them agree"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert start_module._wrong_number_of_hosts(config) == []


def test_relative_paths_are_those_of_the_configuration_s_folder_unless_another_is_given(
    two_hosts, monkeypatch, tmp_path
):
    asked = []

    def load_rank(read_yaml, model_dir, *, lead):
        asked.append((model_dir, lead))
        raise RuntimeError("enough")

    monkeypatch.setattr(follow_module, "load_rank", load_rank)
    path = str(tmp_path / "model-config.yaml")
    for model_dir in (None, "/elsewhere"):
        with pytest.raises(SystemExit):
            follow_module.follow_leader(path, model_dir)
    assert [(str(folder), lead) for folder, lead in asked] == [(str(tmp_path), False), ("/elsewhere", False)]


def test_a_released_follower_lets_go_of_the_group(loaded, caplog):
    engine = FakeEngine()
    loaded(engine)
    follow_module.follow_leader("model-config.yaml")
    assert engine.closed
    assert caplog.messages == [
        "rank 1 of 2: waiting for all ranks to start and load",
        "rank 1 of 2: loaded; following the leader (FakeEngine)",
        "rank 1 of 2: exiting: the leader has released this rank",
    ]


@pytest.mark.parametrize("kind", [PeerLost, RuntimeError])
def test_a_follower_that_is_left_alone_ends_with_one_line(loaded, caplog, kind):
    engine = FakeEngine(kind("publishing a plan failed\nat some address"))
    loaded(engine)
    with pytest.raises(Ended) as caught:
        follow_module.follow_leader("model-config.yaml")
    assert caught.value.args == (EXIT_STEP_FAILED,)
    assert not engine.closed
    assert caplog.messages[-1] == "rank 1 of 2: exiting: publishing a plan failed; at some address"
    assert caplog.records[-1].exc_info in (None, False)


def test_a_bug_is_logged_with_where_it_is(loaded, caplog):
    loaded(FakeEngine(KeyError("page")))
    with pytest.raises(Ended):
        follow_module.follow_leader("model-config.yaml")
    assert caplog.records[-1].exc_info


def test_sigterm_ends_a_follower_even_inside_a_collective(loaded):
    """Python runs a handler of its own only when the call that the main thread is in returns."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loaded(FakeEngine())
    follow_module.follow_leader("model-config.yaml")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
