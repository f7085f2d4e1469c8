"""OpenVINO GenAI as a contender: its own pipeline, reading GGUF, with its defaults (among them an int8 KV cache)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_tp.bench.contenders import Prompts, Timing

if TYPE_CHECKING:
    from llama_tp.bench.compare.engines import Work


class OpenVino:
    name = "openvino"

    def __init__(self, work: Work) -> None:
        import openvino
        import openvino_genai

        self._openvino: Any = openvino
        self._genai: Any = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(str(work.path), "CPU", INFERENCE_NUM_THREADS=work.threads)

    def run(self, prompts: Prompts, new: int) -> Timing:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = self._genai.TokenizedInputs(self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids)))
        result = self._pipeline.generate(inputs, config)
        raw = result.perf_metrics.raw_metrics
        times = [time / 1e3 for time in raw.m_new_token_times]  # milliseconds
        if len(times) != new:
            raise ValueError(f"OpenVINO made {len(times)} steps instead of {new}")
        steps = tuple(late - early for early, late in pairwise(times))
        prefill_s = raw.m_times_to_first_token[0] / 1e6
        return Timing(prefill_s, sum(steps), len(prompts) * (new - 1), steps, tuple(result.tokens[0]))
