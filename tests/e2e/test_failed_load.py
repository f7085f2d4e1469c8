"""A model that cannot be loaded, under a real TorchServe: read once, then refused quickly until it is repaired."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.e2e.torchserve_rig import READY_WITHIN_S, convert, package, serve
from tests.tiny_llama2 import PASSAGE_REQUEST, REST_OF_PASSAGE
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e


def test_a_damaged_checkpoint_is_read_once_and_served_as_soon_as_it_is_repaired(
    tiny_llama2: Path, tmp_path: Path
) -> None:
    convert(tiny_llama2, tmp_path)
    store = package(tmp_path)
    chunk = max((store / "llama" / "converted_checkpoints").iterdir(), key=lambda path: path.stat().st_size)
    sound = chunk.read_bytes()
    chunk.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    work = tmp_path / "torchserve"
    work.mkdir()
    with serve(store, work, wait=False) as server:
        log = server.logs / "model_log.log"

        def refusals() -> list[str]:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            return [line.partition("the model was not loaded: ")[2] for line in lines if "was not loaded" in line]

        assert wait_until(lambda: sum("as before" in reason for reason in refusals()) >= 2, timeout_s=READY_WITHIN_S)
        first, again = dict.fromkeys(refusals())  # of two ranks, and maybe of more attempts
        assert chunk.name in first
        assert again == f"{first} (as before; nothing has changed since)"
        took = re.findall(r"not reading the model again: in (\d+\.\d+) s", log.read_text(errors="replace"))
        assert took
        assert min(map(float, took)) < 1  # a busy machine may take longer once
        chunk.write_bytes(sound)
        repaired = time.monotonic()
        server.wait_ready()
        print(f"refused again in {took} s; READY {time.monotonic() - repaired:.1f} s after the repair")
        assert server.post(PASSAGE_REQUEST).json()["text"] == REST_OF_PASSAGE
