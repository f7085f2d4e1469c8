"""Two thousand requests of all kinds, a third of them cancelled, through two ranks and a cache that is too small."""

from __future__ import annotations

import pytest

from tests.distributed.torchrun import check, torchrun

pytestmark = pytest.mark.distributed


def test_after_two_thousand_requests_no_rank_holds_a_page():
    done = torchrun(2, "tests.distributed.soak_worker", "2000")
    check(done)
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank ")) == [
        f"rank {rank}: 0 pages used" for rank in range(2)
    ]
