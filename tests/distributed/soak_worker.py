"""One rank of the soak: random requests come, go and are cancelled; at the end nothing may be left on any rank.

Usage: torchrun ... -m tests.distributed.soak_worker NUM_REQUESTS
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.parallel.apply import localize, parallelize
from llama_tp.parallel.launch import join
from llama_tp.parallel.sharding import local_kv_heads
from tests.distributed.torchrun import exit_rank
from tests.tiny_model import MODELS, random_model

ARGS = MODELS["mha"]
CONFIG = EngineConfig(
    max_seq_len=96,
    max_batch_size=8,
    max_batched_tokens=40,
    page_size=4,
    cache_pages=90,
    max_waiting=24,
    speculative_tokens=3,
    speculative_max_batch=8,
)
CANCELLED = 0.3
STOP = frozenset({3, 40, 77})


def random_request(number: int, rng: random.Random, earlier: list[tuple[int, ...]]) -> Request:
    length = rng.randint(1, 60)
    prompt = rng.choice(earlier)[: rng.randint(0, length)] if earlier and rng.random() < 0.5 else ()
    prompt += tuple(rng.randrange(ARGS.vocab_size) for _ in range(length - len(prompt)))
    earlier.append(prompt)
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 30),
        temperature=rng.choice([0, 0.8, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias=rng.choice([{}, {5: 2.0}]),
        seed=number,
        n=rng.choice([1, 1, 1, 3]),
        logprobs=rng.choice([None, 2]),
        stop_ids=rng.choice([frozenset(), STOP]),
    )
    return Request(str(number), prompt, params)


def lead(engine: Engine, num_requests: int, rng: random.Random) -> Counter[str]:
    """Feed, step and cancel until all have ended. How they ended."""
    lives: dict[str, Request] = {}
    tokens: Counter[tuple[str, int]] = Counter()
    cancel_at: dict[str, int] = {}
    ends: Counter[str] = Counter()
    earlier: list[tuple[int, ...]] = []
    number = step = 0
    coming = random_request(number, rng, earlier)
    while number < num_requests or engine.num_requests:
        for _ in range(rng.choice([0, 0, 1, 2])):
            if number < num_requests and engine.scheduler.can_queue(coming):
                engine.add(coming)
                lives[coming.id] = coming
                if rng.random() < CANCELLED:
                    cancel_at[coming.id] = step + rng.randint(0, 12)
                number += 1
                coming = random_request(number, rng, earlier)
        for request_id in [request_id for request_id, due in cancel_at.items() if due <= step]:
            del cancel_at[request_id]
            ends["cancelled"] += engine.cancel(request_id)
        for event in engine.step():
            request, key = lives[event.request_id], (event.request_id, event.index)
            tokens[key] += event.token_id is not None
            if event.finish_reason is not None:
                ends[event.finish_reason.value] += 1
                if event.finish_reason is FinishReason.LENGTH:
                    assert tokens[key] == request.params.max_new_tokens, "a length is not exact"
                else:
                    assert event.finish_reason is FinishReason.STOP
                    assert request.params.stop_ids
        step += 1
    return ends


def main() -> None:
    group = join("cpu")
    assert group.mesh is not None
    model = localize(parallelize(random_model(ARGS), group.mesh), group.comm)
    kv_heads = local_kv_heads(ARGS, group.comm.size, group.comm.rank)
    runner = ModelRunner(model, CONFIG, num_kv_heads=kv_heads, dtype=torch.float32, device=group.device)
    engine = Engine(runner, group.comm, CONFIG)
    if engine.is_leader:
        ends = lead(engine, int(sys.argv[1]), random.Random(1))
        stats = engine.stats()
        engine.heartbeat()  # tells the followers which rows the last step freed
        engine.release()
        assert (stats.running, stats.waiting, stats.pages_used, engine.num_requests) == (0, 0, 0, 0)
        assert engine.sampler.is_idle
        assert stats.preemptions > 0
        assert stats.prefix_hit_tokens > 0
        assert stats.accepted_tokens > 0
        print(f"{dict(ends)} {stats}\n", end="")
    else:
        engine.follow()
    print(f"rank {group.comm.rank}: {runner.page_table.num_used} pages used\n", end="")
    exit_rank(group)


if __name__ == "__main__":
    main()
