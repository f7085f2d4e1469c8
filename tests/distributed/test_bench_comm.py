"""`llama-tp bench comm` measures both ways of talking and ends with a line of JSON."""

from __future__ import annotations

import json

import pytest

from tests.distributed.torchrun import check, torchrun

pytestmark = pytest.mark.distributed


def test_both_ways_of_talking_are_measured():
    done = torchrun(2, "llama_tp", "bench", "comm", "--rounds", "30")
    check(done)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["comm"], row["what"]) for row in rows] == [
        (comm, what)
        for comm in ("SharedMemoryComm", "GroupComm")
        for what in ("publish: leader", "publish: last follower", "all-reduce of 8 KB")
    ]
    assert all(0 < row["median_us"] <= row["p99_us"] for row in rows)
