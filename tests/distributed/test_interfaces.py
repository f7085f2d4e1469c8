"""Ranks that are told to talk over an interface that this host lacks."""

from __future__ import annotations

import re

import pytest

from tests.distributed.torchrun import torchrun

pytestmark = pytest.mark.distributed


def test_an_interface_that_this_host_lacks_is_one_line():
    """gloo said it in 91."""
    done = torchrun(2, "llama_tp", "bench", "comm", "--rounds=1", env={"GLOO_SOCKET_IFNAME": "eth77"})
    assert done.returncode == 1
    ours, torchruns = re.split(r"^E\d{4} ", done.stderr, maxsplit=1, flags=re.MULTILINE)  # how it reports a lost rank
    assert "GLOO_SOCKET_IFNAME=eth77: this host has no network interface 'eth77'; it has " in ours
    assert "eth77" not in torchruns
    assert "Traceback" not in ours
