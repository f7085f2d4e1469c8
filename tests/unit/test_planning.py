"""What a plan says of memory and time is what ranks hold, and what the formula of a step's least time gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_tp.config import EngineConfig, parse_memory
from llama_tp.engine.memory import MemoryModel
from llama_tp.model.published import PUBLISHED
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import num_parameters_of_rank
from llama_tp.planning import devices as devices_module
from llama_tp.planning.advice import advise
from llama_tp.planning.devices import DEVICES, GIB, find_device
from llama_tp.planning.estimate import Estimate
from llama_tp.planning.needs import GroupNeeds

H100 = replace(DEVICES["h100"], bandwidth=3.0e12)
"""As in the published table of floors."""


def estimate(name, size=1, device=H100, *, batch=32, length=4096, context=0):
    config = EngineConfig(max_batch_size=batch, max_seq_len=length)
    args = name if isinstance(name, ModelArgs) else PUBLISHED[name]
    return Estimate(args, device, size, "bfloat16", config, context)


@pytest.mark.parametrize(
    ("name", "gigabytes", "milliseconds", "rate", "kib_per_token"),
    [
        ("llama2-7b", 13.21, 4.40, 227, 512),
        ("llama2-13b", 25.70, 8.57, 117, 800),
        ("llama3.1-8b", 15.01, 5.00, 200, 128),
    ],
)
def test_the_least_time_per_token_is_that_of_reading_the_weights(name, gigabytes, milliseconds, rate, kib_per_token):
    """A table computed by hand: weights without the embedding, at 3.0 TB/s."""
    one = estimate(name)
    step = one.step(1)
    assert step.bytes_read / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert 1e3 * step.seconds == pytest.approx(milliseconds, abs=0.006)
    assert round(step.tokens_per_s) == rate
    assert one.needs.kv_token == kib_per_token * 2**10


@pytest.mark.parametrize(("latency", "rate"), [(0.0, 175), (7e-6, 146), (23e-6, 106)])
def test_all_reduces_add_to_the_time_of_the_busiest_rank(latency, rate):
    """The same table: 70B on 8 ranks, 137.4 GB in all, with all-reduces that only take their latency."""
    one = estimate("llama2-70b", 8, replace(H100, latency=latency, link=float("inf")))
    assert 8 * one.step(1).bytes_read / 1e9 == pytest.approx(137.4, abs=0.1)
    assert one.all_reduces == 2 * 80 + 1
    assert one.all_reduce_bytes == 2 * 8192
    assert one.step(1).tokens_per_s == pytest.approx(rate, abs=0.6)


def test_the_context_of_every_sequence_is_read_too():
    one, step = estimate("llama2-7b", context=1000), estimate("llama2-7b", context=1000).step(16)
    assert step.bytes_read == one.needs.bytes_read(0) + 16 * 1000 * 512 * 2**10
    assert step.bound == "reading"
    assert step.tokens_per_s == pytest.approx(16 / (step.bytes_read / 3.0e12))


def test_a_large_batch_is_bound_by_arithmetic():
    """Two operations per parameter and token; the embedding takes none."""
    step = estimate("llama2-7b").step(2048)
    multiplied = 6_738_415_616 - 32000 * 4096
    assert step.bound == "computing"
    assert step.seconds == pytest.approx(2 * multiplied * 2048 / (0.8 * 989e12))


def test_tied_embeddings_are_read_as_the_output():
    """On a GPU from the one matrix; on a CPU from a packed copy of it, in addition to which it is held."""
    args = PUBLISHED["llama3.2-1b"]
    gpu, cpu = (GroupNeeds.of(args, 1, "bfloat16", kind) for kind in ("cuda", "cpu"))
    assert gpu.bytes_read(0) == cpu.bytes_read(0) == gpu.weights == 2 * 1_235_814_400
    assert cpu.weights == gpu.weights + 2 * 128256 * 2048


def test_an_even_group_costs_nothing_for_unevenness_and_others_what_their_busiest_rank_reads():
    even, uneven = estimate("llama2-70b", 8), estimate("llama2-70b", 7)
    assert even.step(1).seconds == pytest.approx(even.step(1).even_s, rel=2e-4)  # norms are on every rank
    step = uneven.step(1)
    assert step.seconds - step.even_s == pytest.approx((step.bytes_read - uneven.whole.bytes_read(0) / 7) / 3.0e12)
    assert uneven.unevenness > 1.1


@pytest.mark.parametrize(
    ("name", "size", "share"),
    [
        # The busiest rank has 3, 2, 2 and 2 of 8 kv heads with their queries (3 of 8 against 1/3, and so on), and its
        # part of the feed-forward in steps of 32 columns.
        ("llama2-70b", 3, 24 / 64),
        ("llama2-70b", 5, 16 / 64),
        ("llama2-70b", 6, 16 / 64),
        ("llama2-70b", 7, 16 / 64),
        ("llama3.1-405b", 12, 12 / 128),  # 5 queries of one kv head and 6 of another, filled up to 12
    ],
)
def test_uneven_groups_hold_what_was_computed_on_paper(name, size, share):
    args, group = PUBLISHED[name], GroupNeeds.of(PUBLISHED[name], size, "bfloat16", "cuda")
    kv_heads = {3: 3, 5: 2, 6: 2, 7: 2, 12: 2}[size]
    columns = 32 * -(-args.hidden_dim // 32 // size)
    rows = -(-args.vocab_size // size)
    attention = args.dim * (2 * share * args.dim + 2 * kv_heads * args.head_dim)
    layer = attention + 3 * args.dim * columns + 2 * args.dim
    on_paper = args.n_layers * layer + 2 * rows * args.dim + args.dim
    assert group.parameters <= on_paper  # no rank need be the busiest in everything
    assert group.parameters >= 0.97 * on_paper
    assert group.weights == 2 * group.parameters
    assert group.kv_token == 2 * args.n_layers * kv_heads * args.head_dim * 2


@pytest.mark.parametrize("size", range(1, 17))
@pytest.mark.parametrize("name", ["llama2-7b", "llama2-70b", "llama3.1-405b", "qwen2.5-7b"])
def test_the_busiest_rank_is_the_largest_of_all_ranks(name, size):
    args, config = PUBLISHED[name], EngineConfig(max_seq_len=4096)
    group = GroupNeeds.of(args, size, "bfloat16", "cuda")
    every = [MemoryModel.of(args, config, size, rank, "bfloat16", "cuda") for rank in range(size)]
    assert group.weights == max(rank.weights for rank in every)
    assert group.kv_token == max(rank.token for rank in every)
    assert group.parameters == max(num_parameters_of_rank(args, size, rank) for rank in range(size))
    assert group.bytes_held(1000) == max(rank.weights + 1000 * rank.token for rank in every)
    assert group.cache_tokens(100 * GIB, 0.9) == min(
        int(0.9 * max(0, 100 * GIB - rank.weights)) // rank.token for rank in every
    )


@pytest.mark.parametrize("device", ["h100", "l4", "cpu"])
@pytest.mark.parametrize("name", ["llama2-7b", "llama3.2-1b", "qwen2.5-7b"])
@pytest.mark.parametrize("size", [1, 3])
def test_what_fits_is_what_the_engine_would_allocate(name, size, device, monkeypatch):
    monkeypatch.setattr(devices_module, "available_cores", lambda: 4)
    one = estimate(name, size, replace(find_device(device), memory=64 * GIB), length=2048)
    ranks = [MemoryModel.of(one.args, one.config, size, rank, "bfloat16", one.device.type) for rank in range(size)]
    outside = 0 if device == "cpu" else GIB
    pages = [
        replace(rank, config=replace(one.config, cache_pages=10**9)).num_pages(
            one.memory - outside - rank.weights, one.step_memory
        )
        for rank in ranks
    ]
    assert min(pages) == pytest.approx(one.cache_tokens / 16, abs=2)
    assert one.max_batch == one.cache_tokens // 2048
    assert one.fits == (one.total <= one.memory) == (one.max_batch >= 32)


def test_the_estimate_of_a_step_is_what_a_gpu_took():
    """Llama 3.1 8B with chunks of 2,048 tokens and 128 sequences: 1.2 GiB on an H200 (docs/performance.md)."""
    config = EngineConfig(max_batch_size=128, max_seq_len=8192, max_batched_tokens=2048)
    one = Estimate(PUBLISHED["llama3.1-8b"], H100, 1, "bfloat16", config, 0)
    assert one.step_memory / GIB == pytest.approx(1.2, abs=0.06)


def test_ranks_on_cpus_share_a_host(monkeypatch):
    monkeypatch.setattr(devices_module, "available_cores", lambda: 4)
    alone, four = (estimate("llama2-7b", size, find_device("cpu")) for size in (1, 4))
    assert four.memory == alone.memory // 4
    assert four.step(1).reading_s == pytest.approx(alone.step(1).reading_s, rel=1e-3)
    assert four.step(1).seconds > alone.step(1).seconds


def test_every_device_has_a_source_and_plausible_figures():
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source
        assert 20 * GIB < device.memory < 200 * GIB
        assert 10 < device.flops / device.bandwidth < 1000
        assert device.link < device.bandwidth
    assert DEVICES["h100"].bandwidth == pytest.approx(3.0e12, rel=0.02)  # measured: 3,064 GB/s
    assert DEVICES["h200"].bandwidth == pytest.approx(4.339e12, rel=0.02)  # measured
    with pytest.raises(ValueError, match=r"^device='rtx409' is not in the table of devices; did you mean rtx4090\?"):
        find_device("rtx409")


def advice(name, device="h100", sizes=8, memory=None, **limits):
    chosen = DEVICES[device] if memory is None else replace(DEVICES[device], memory=parse_memory(memory))
    return advise(name, [estimate(name, size, chosen, **limits) for size in range(1, sizes + 1)])


def test_the_smallest_group_that_holds_all_sequences_is_recommended():
    one = advice("llama2-7b", batch=8)
    assert one.size == 1
    assert one.text.startswith("llama2-7b fits on 1 h100 with 8 requests of 4096 tokens: at most ")
    three = advice("llama2-70b")
    assert three.size == 3
    assert "does not fit on 2 h100 with 32 requests of 4096 tokens (there is room for 20); use 3: at most" in three.text
    assert "\n" not in three.text


def test_an_uneven_group_and_one_of_several_hosts_are_remarked_upon():
    uneven = advice("llama2-70b", memory="27GiB", batch=1)
    assert uneven.size == 6
    assert uneven.text.endswith("; the busiest rank holds 1.09 of an even share, with 8 it would be 1.00")
    wide = advice("llama3.1-405b", sizes=16, batch=1)
    assert wide.size == 11
    assert wide.text.endswith("; a host usually has 8, and all-reduces between hosts are slower")


def test_what_fits_only_in_part_or_not_at_all_is_said():
    part = advice("llama2-70b", sizes=2)
    assert part.size == 2
    assert "does not fit on 2 h100 with 32 requests of 4096 tokens; there is room for 20 on 2 h100, and" in part.text
    none = advice("llama2-70b", "l4", sizes=4)
    assert none.size is None
    assert none.text.endswith("nor with one; use devices with more memory, or reduce max_seq_len")
