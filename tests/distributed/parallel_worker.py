"""One rank of the equivalence tests: runs every model in all forms and lets the leader save what came out.

Usage: torchrun ... -m tests.distributed.parallel_worker FOLDER, which holds a checkpoint for each model by name.
"""

from __future__ import annotations

import sys

import torch

from llama_tp.checkpoint.load import load_model
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.parallel.apply import localize, parallelize
from llama_tp.parallel.comm import GroupComm
from llama_tp.parallel.launch import join
from llama_tp.parallel.sharding import local_kv_heads
from llama_tp.parallel.shared_memory import SharedMemoryComm
from tests.distributed.torchrun import exit_rank
from tests.tiny_model import MODELS, UNEVEN, VARIANTS, random_model

TOKENS = tuple(range(3, 43))
PROMPTS = [[5, 6, 7], list(range(40)), [1], [9, 8] * 11]
SCORE = SamplingParams(max_new_tokens=0, prompt_logprobs=2)
PLAN = StepPlan(1, (Chunk(0, 0, TOKENS, 1),), tuple((0, index, index) for index in range(3)))


def main() -> None:
    group = join("cpu")
    assert group.mesh is not None
    assert isinstance(group.comm, SharedMemoryComm)
    config = EngineConfig(max_seq_len=128, max_batch_size=4)
    results = {}
    for name, args in {**MODELS, **VARIANTS, **UNEVEN}.items():
        if group.comm.size > args.n_heads:
            continue
        for comm in (group.comm, GroupComm("gloo", leader=0, timeout_s=60)):
            model = parallelize(random_model(args), group.mesh)
            options = {"dtype": torch.float32, "device": torch.device("cpu")}
            options["num_kv_heads"] = local_kv_heads(args, comm.size, comm.rank)
            if comm is group.comm:
                read = load_model(f"{sys.argv[1]}/{name}", args, group, torch.float32)
                loaded = ModelRunner(read, config, **options).execute(PLAN)
            padded = max(local_kv_heads(args, comm.size, rank) for rank in range(comm.size))
            runner = ModelRunner(model, config, **{**options, "num_kv_heads": padded})
            for row, index, page in PLAN.page_updates:
                runner.page_table[row].set(index, page)
            with torch.no_grad():
                dtensor = model(runner.prepare(PLAN.chunks).batch, runner.cache).logits.clone()  # waits for the gather
            engine = Engine(ModelRunner(localize(model, comm), config, **options), comm, config)
            if comm.is_leader:
                local = engine.runner.execute(PLAN)
            else:
                engine.runner.execute(PLAN)
            greedy = engine.generate(PROMPTS, SamplingParams(max_new_tokens=16, temperature=0))
            scored = engine.generate(PROMPTS, SCORE)
            if comm.is_leader:
                results[name, type(comm).__name__] = {
                    "dtensor": dtensor,
                    "local": local,
                    "loaded": loaded,
                    "greedy": [completion.token_ids for completion in greedy],
                    "scores": [[one.chosen for one in completion.prompt_logprobs or ()] for completion in scored],
                }
    if group.comm.is_leader:
        torch.save(results, f"{sys.argv[1]}/results.pt")
    exit_rank(group)


if __name__ == "__main__":
    main()
