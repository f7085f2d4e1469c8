"""One rank of the test of unequal shares: loads every model with its shares and lets the leader save what came out.

Usage: torchrun --nproc-per-node 3 ... -m tests.distributed.shares_worker FOLDER, with a checkpoint for each case.
"""

from __future__ import annotations

import sys

import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.parallel.launch import join
from tests.distributed.parallel_worker import PLAN, PROMPTS
from tests.distributed.torchrun import exit_rank
from tests.tiny_model import MODELS, UNEVEN, VARIANTS

ARGS = {**MODELS, **VARIANTS, **UNEVEN}
CASES = {
    ("gqa", (6, 3, 3)),
    ("gqa", (1, 5, 6)),  # parts of kv heads: 1 query of the first; 2 and 3; 3 and 3
    ("mha", (2, 1, 1)),
    ("tied", (1, 1, 2)),
    ("multiplier", (1, 2, 1)),
    ("attention bias", (4, 3, 1)),
    ("biases everywhere", (1, 1, 2)),
    ("head norms, wide heads", (2, 1, 1)),
    ("9 heads, 3 kv", (6, 2, 1)),
    ("8 heads, 1 kv", (5, 2, 1)),
}


def folder_of(name: str, shares: tuple[int, ...]) -> str:
    return f"{name} {'-'.join(map(str, shares))}"


def main() -> None:
    group = join("cpu")
    results = {}
    for name, shares in sorted(CASES):
        config = EngineConfig(max_seq_len=128, max_batch_size=4, dtype="float32", device="cpu", tp_shares=shares)
        engine = load_engine(f"{sys.argv[1]}/{folder_of(name, shares)}", ARGS[name], config, group)
        logits = engine.runner.execute(PLAN)
        greedy = engine.generate(PROMPTS, SamplingParams(max_new_tokens=16, temperature=0))
        if group.comm.is_leader:
            results[name, shares] = (logits, [completion.token_ids for completion in greedy])
    if group.comm.is_leader:
        torch.save(results, f"{sys.argv[1]}/results.pt")
    exit_rank(group)


if __name__ == "__main__":
    main()
