"""An engine is loaded only on as many ranks as there are shares, and only with shares that cover the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.config_error import ConfigError
from llama_tp.engine import startup
from llama_tp.engine.startup import load_engine
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_model import MODELS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return convert_beside(write_originals(tmp_path_factory.mktemp("model") / "originals"), max_seq_len=128)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((3, 1), r"^tp_shares=\[3, 1\] has shares for 2 ranks, but there are 1; give each rank its query heads$"),
        ((3,), r"^tp_shares=\[3\] adds up to 3, but must add up to n_heads=4$"),
    ],
)
def test_shares_must_fit_ranks_and_model(checkpoint, shares, words):
    group = SimpleNamespace(comm=SingleComm(), device=torch.device("cpu"), mesh=None)
    config = EngineConfig(max_seq_len=64, max_batch_size=1, device="cpu", tp_shares=shares)
    with pytest.raises(ValueError, match=words):
        load_engine(str(checkpoint), MODELS["mha"], config, group)


@pytest.mark.parametrize("shares", [[2, 2], (2.0, 2), "22"])
def test_shares_are_a_tuple_of_integers(shares):
    with pytest.raises(ConfigError, match="must be a tuple of integers, the query heads of each rank"):
        EngineConfig(tp_shares=shares)


@pytest.mark.parametrize(("compile_kernels", "is_counted"), [(True, True), (False, False)])
def test_the_buffers_of_the_kernels_are_kept_free(checkpoint, monkeypatch, caplog, compile_kernels, is_counted):
    """The KV cache took their memory, too."""
    monkeypatch.setattr(startup, "free_memory", lambda device: 64 << 20)
    group = SimpleNamespace(comm=SingleComm(), device=torch.device("cpu"), mesh=None)
    config = EngineConfig(max_seq_len=64, max_batch_size=1, device="cpu", compile=compile_kernels, kv_cache_memory=0.5)
    with caplog.at_level("INFO"):
        engine = load_engine(str(checkpoint), ModelArgs.load_converted(checkpoint / "model_args.json"), config, group)
    kept = (64 << 20) - 2 * engine.runner.cache.memory().nbytes
    assert (kept > 1 << 18) == is_counted
    assert ("MiB reserved for a step" in caplog.text) == is_counted
