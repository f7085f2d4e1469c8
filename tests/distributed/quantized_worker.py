"""One rank that computes with every quantized checkpoint of a folder, and lets the leader save what came out.

Usage: torchrun ... -m tests.distributed.quantized_worker FOLDER RESULTS NAME..., names of checkpoints in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llama_tp.model import quantized_linear
from llama_tp.model.quantized_linear import QuantizedLinear
from llama_tp.parallel.launch import join
from tests.distributed.torchrun import exit_rank
from tests.tiny_quantized import engine_on, outputs_of


def main() -> None:
    folder, results, *names = sys.argv[1:]
    # As on a GPU: a CPU would widen the shards once, when it computes in float32, and use its own kernels.
    quantized_linear.quantized_linear = lambda weight, bias, _dtype, _layout: QuantizedLinear(weight, bias)
    group = join("cpu")
    found = {}
    for name in names:
        modules = engine_on(Path(folder, name), group, compile=False).runner.model.modules()
        held = sum(one.num_bytes for one in modules if isinstance(one, QuantizedLinear))
        found[name] = (*outputs_of(Path(folder, name), group, compile=False), held)
    if group.comm.is_leader:
        torch.save(found, results)
    exit_rank(group)


if __name__ == "__main__":
    main()
