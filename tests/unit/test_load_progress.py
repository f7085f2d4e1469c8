"""While a model is loaded, the log tells how much of it is read."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from llama_tp.checkpoint import load_progress
from llama_tp.checkpoint.load import load_model
from llama_tp.parallel.launch import join
from tests.tiny_checkpoint import ARGS
from tests.tiny_converted import convert_beside, write_originals


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(convert_beside(write_originals(tmp_path_factory.mktemp("progress") / "originals")))


def told(folder, caplog):
    """The percentages in the log of a load."""
    with caplog.at_level(logging.INFO):
        load_model(folder, ARGS, join("cpu"), torch.bfloat16)
    found = (re.fullmatch(load_progress.READ.format(percent=r"(\d+)"), line) for line in caplog.messages)
    return [int(one[1]) for one in found if one]


def test_a_long_load_says_how_far_it_is(folder, monkeypatch, caplog):
    monkeypatch.setattr(load_progress, "_QUIET_S", 0)
    percentages = told(folder, caplog)
    assert len(percentages) > 2
    assert percentages == sorted(set(percentages))
    assert percentages[-1] == 100


def test_a_short_load_is_silent(folder, caplog):
    assert told(folder, caplog) == []
