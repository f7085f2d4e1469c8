"""How much KV cache a rank gets, and what is said when something does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine import memory_probe as module
from llama_tp.engine.memory import ITEMSIZE, MemoryModel
from llama_tp.engine.memory_probe import compute_largest_steps, config_for_measuring
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import Scheduler
from llama_tp.model.linear import Linear
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.sharding import local_kv_heads
from llama_tp.torchserve.config import ModelConfig
from tests.paths import CONFIGS
from tests.tiny_model import MODELS, VARIANTS, engine_of, random_model

GIB = 2**30
LLAMA2_7B = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000)
ARGS = MODELS["gqa"]
CONFIG = EngineConfig(max_seq_len=4096, max_batch_size=16)
PER_SEQUENCE = 4096 // 16


def model_of(dtype="bfloat16", device="cuda", **changes):
    return MemoryModel.of(LLAMA2_7B, dataclasses.replace(CONFIG, **changes), 1, 0, dtype, device)


def test_the_needs_are_those_of_the_published_model():
    """6.74 billion parameters; 512 KiB of keys and values a token (arXiv:2307.09288, table 1 and its architecture)."""
    memory = model_of()
    assert memory.weights == pytest.approx(2 * 6.74e9, rel=1e-3)
    assert memory.page == 16 * 512 * 2**10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_the_needs_are_what_a_loaded_rank_holds(args, dtype):
    """Norms, which are a thousandth of a real model, are kept in float32 on a CPU."""
    model = localize(random_model(args).to(getattr(torch, dtype)), SingleComm())
    layers = sum(module.num_bytes for module in model.modules() if isinstance(module, Linear))
    num_norms = (2 * args.n_layers + 1) * args.dim
    memory = MemoryModel.of(args, CONFIG, 1, 0, dtype, "cpu")
    assert memory.weights - num_norms * ITEMSIZE[dtype] == layers + model.tok_embeddings.weight.nbytes


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_the_needs_include_biases_and_the_norms_of_heads(args, size):
    memory = MemoryModel.of(args, CONFIG, size, 0, "float32", "cuda")
    vectors = (2 * args.n_layers + 1) * args.dim
    wqkv_rows = args.n_heads * args.head_dim // size + 2 * local_kv_heads(args, size, 0) * args.head_dim
    vectors += args.n_layers * wqkv_rows * args.qkv_bias
    vectors += args.n_layers * args.dim * args.wo_bias
    vectors += args.n_layers * (2 * args.hidden_dim // size + args.dim) * args.ffn_bias
    vectors += args.n_layers * 2 * args.head_dim * args.qk_norm
    matrices = args.n_layers * args.dim * (wqkv_rows + args.n_heads * args.head_dim // size)
    matrices += args.n_layers * 3 * args.dim * args.hidden_dim // size
    matrices += (1 if args.tied_embeddings else 2) * -(-args.vocab_size // size) * args.dim
    assert memory.weights == 4 * (vectors + matrices)


def test_weights_that_do_not_fit_are_refused_before_they_are_read():
    with pytest.raises(
        ValueError, match=r"2\.0 GiB of KV cache in addition to 12\.6 GiB .* 14\.0 GiB are free; use more"
    ):
        model_of().check(14 * GIB)
    with pytest.raises(ValueError, match=r"in addition to 25\.1 GiB .*; or set dtype to bfloat16"):
        model_of("float32").check(24 * GIB)
    with pytest.raises(ValueError, match=r"^kv_cache_memory='20GiB' requests 20\.0 GiB .* are free; reduce it"):
        model_of(kv_cache_memory="20GiB").check(24 * GIB)
    model_of().check(15 * GIB)
    model_of().check(None)


@pytest.mark.parametrize(
    ("memory", "free", "step", "device", "pages"),
    [
        (None, 100 * GIB, 0, "cuda", 16 * PER_SEQUENCE),  # all that max_batch_size sequences can need
        (None, 11 * GIB, GIB, "cuda", 9 * GIB // 2**23),  # 0.9 of what a step leaves
        (None, 11 * GIB, 0, "cpu", 11 * GIB // 2**24),  # half of the host's
        (None, 3 * GIB, 0, "cpu", PER_SEQUENCE),  # but one whole sequence in any case
        (None, None, 0, "cpu", 16 * PER_SEQUENCE),
        ("8GiB", 11 * GIB, 0, "cuda", 1024),
        (2**33, None, 0, "cpu", 1024),
        (0.5, 11 * GIB, GIB, "cuda", 5 * GIB // 2**23),
    ],
)
def test_the_cache_takes_what_was_asked_for_or_a_share_of_what_is_left(memory, free, step, device, pages):
    assert model_of(kv_cache_memory=memory, device=device).num_pages(free, step) == pages


@pytest.mark.parametrize(
    ("memory", "free", "step", "words"),
    [
        (
            None,
            2 * GIB,
            GIB,
            r"the KV cache needs 2\.0 GiB on each rank, and a step 1\.0 GiB, but only 2\.0 GiB are free",
        ),
        ("10GiB", 10 * GIB, GIB, r"the KV cache needs 10\.0 GiB"),
        (
            "1GiB",
            10 * GIB,
            0,
            r"holds only 2048 tokens on each rank, less than one sequence of max_seq_len=4096; raise",
        ),
        (0.1, 10 * GIB, 0, r"kv_cache_memory=0\.1 holds only 2048 tokens"),
        (0.5, None, 0, r"cannot determine how much memory is free on this system; set bytes"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_by_name(memory, free, step, words):
    with pytest.raises(ValueError, match=words):
        model_of(kv_cache_memory=memory).num_pages(free, step)


def test_the_largest_steps_are_as_large_as_the_limits_allow_and_leave_no_row_in_use(monkeypatch):
    limits = EngineConfig(max_seq_len=64, max_batch_size=3, max_batched_tokens=32)
    config = config_for_measuring(limits)
    runner = engine_of(random_model(ARGS), **dataclasses.asdict(config)).runner
    plans, sampled = [], []
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda plan: plans.append(plan) or execute(plan))
    monkeypatch.setattr(module.Sampler, "sample", lambda _, logits, rows: sampled.append((logits.shape, len(rows))))
    compute_largest_steps(runner, is_leader=True)
    prefill, decode, _ = plans
    assert [(len(chunk.tokens), chunk.start + len(chunk.tokens)) for chunk in prefill.chunks] == [(32, 64)]
    assert [len(chunk.tokens) for chunk in decode.chunks] == [1, 1, 1]
    assert sampled == [((1, ARGS.vocab_size), 1), ((3, ARGS.vocab_size), 3)]
    assert runner.page_table.num_used == 0


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_demo_s_configuration_runs_32_short_requests_at_once(ranks):
    """It admitted 8, whatever their length: the others waited 39 s for their first token."""
    demo = ModelArgs(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152, ffn_hidden_dim=1536)
    model_config = ModelConfig.load(CONFIGS / "demo-cpu.yaml")
    config = model_config.engine_config(demo)
    memory = MemoryModel.of(demo, config, ranks, 0, "float32", "cpu")
    config = dataclasses.replace(config, cache_pages=memory.num_pages(4 * GIB, 0))
    scheduler = Scheduler(config)
    for number in range(32):
        scheduler.add(Request(str(number), tuple(range(136)), SamplingParams(max_new_tokens=64)))
    while scheduler.num_waiting:
        _, sequences = scheduler.plan()
        scheduler.commit([7] * len(sequences))
    assert len(scheduler.running) == 32
    for _ in range(63):
        _, sequences = scheduler.plan()
        scheduler.commit([7] * len(sequences))
    assert scheduler.num_preemptions == 0
    assert model_config.batchSize == 32  # what TorchServe hands over at once
