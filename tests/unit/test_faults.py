"""Random faults: any changed byte of a checkpoint is refused at load; a killed conversion leaves a clean state."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.store.hash_cache import HASH_CACHE
from llama_tp.checkpoint.store.manifest import MANIFEST
from llama_tp.checkpoint.store.verify import verify
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from tests.tiny_converted import convert_beside, write_originals

NUM_CORRUPTIONS, NUM_KILLS = 200, 50


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("faults") / "meta", num_shards=2)


def load(folder: Path) -> None:
    args = ModelArgs.load_converted(folder / "model_args.json")
    load_model(str(folder), args, join("cpu"), torch.float32)


def test_every_changed_byte_is_refused_at_load(originals, monkeypatch, tmp_path):
    """In every file: weights, metadata, settings, tokenizer."""
    monkeypatch.setenv("LLAMA_TP_CACHE", str(tmp_path))
    folder = convert_beside(originals)
    rng = random.Random(0)
    names = sorted(json.loads((folder / MANIFEST).read_text())["files"])
    assert len(names) >= 4
    for number in range(NUM_CORRUPTIONS):
        path = folder / names[number % len(names)]
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        damaged = bytes([*whole[:at], whole[at] ^ rng.randrange(1, 256), *whole[at + 1 :]])
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=folder.name):
            load(folder)
        assert not (folder / HASH_CACHE).exists(), f"byte {at} of {path.name} was believed"
        path.write_bytes(whole)
    load(folder)


def _convert(originals: Path, destination: Path) -> None:
    convert(
        str(originals),
        str(originals),
        None,
        str(destination),
        model_args_path=str(destination / "model_args.json"),
        overwrite=True,
    )


def test_a_conversion_that_is_killed_at_a_random_moment_leaves_the_old_checkpoint_or_the_new_one(originals, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_tp.checkpoint.convert", "sentencepiece"])
    destination = tmp_path / "converted"

    whole = 60.0  # the shortest that a conversion has taken; the first one is not killed
    rng, num_interrupted = random.Random(0), 0
    for number in range(NUM_KILLS):
        child = context.Process(target=_convert, args=(originals, destination))
        child.start()
        start = time.monotonic()
        child.join(rng.uniform(0, 1.5 * whole) if number else None)
        seconds = time.monotonic() - start
        child.kill()  # harmless if it has just ended
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        was_interrupted = child.exitcode != 0
        whole = whole if was_interrupted else min(whole, seconds)
        num_interrupted += was_interrupted
        verify(destination)
        load(destination)
    assert num_interrupted > NUM_KILLS / 4
    _convert(originals, destination)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"], "the last one cleans up after the others"
