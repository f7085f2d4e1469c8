"""In deterministic mode several ranks, too, compute a token's logits to the same bits in any company."""

from __future__ import annotations

import pytest

from tests.distributed.torchrun import check, torchrun

pytestmark = pytest.mark.distributed


def test_logits_of_four_ranks_are_bit_identical_alone_and_batched():
    """And without the mode they are not: else this would prove nothing."""
    done = torchrun(4, "tests.distributed.deterministic_worker")
    check(done)
    assert sorted(line for line in done.stdout.splitlines() if "equal" in line) == sorted(
        f"{comm} {dtype}: equal [True, True], otherwise changed [True, True]"
        for comm in ("SharedMemoryComm", "GroupComm")
        for dtype in ("torch.float32", "torch.bfloat16")
    )
