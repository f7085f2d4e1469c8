"""The collectives, over shared memory and over gloo: exact results, any size, and a silent leader is noticed."""

from __future__ import annotations

import pytest

from tests.distributed.torchrun import check, torchrun

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("shared", 2), ("shared", 3), ("gloo", 2), ("gloo", 3), ("ordered", 3), ("shared plans", 3)],
)
def test_collectives_are_exact_and_a_silent_leader_is_noticed_within_the_timeout(kind, ranks):
    done = torchrun(ranks, "tests.distributed.comm_worker", kind)
    check(done)
    assert done.stdout.count("noticed: ") == ranks - 1
