"""A prototype of the decode step on a GPU: one CUDA graph, with fused Triton kernels over a paged cache."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import kernels
from gpu.device import CUDA, DEVICE, DTYPE, SMOKE, call_us, capture, kernel_times, relative_error, sync
from gpu.models import StubComm, build_local_model, model_args, with_roofline
from gpu.report import Report
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.rope import rope_table
from llama_tp.model.transformer import Transformer
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import local_kv_heads


@dataclass(frozen=True)
class Variant:
    """Options of the prototype's step."""

    dot: bool = False
    """Attention on tensor cores even if a kv head has a single query."""
    own_gemv: bool = False
    """At batch 1, our matrix-vector product instead of cuBLAS's, with PDL if available."""
    pdl: bool = False
    """Programmatic dependent launch of the small kernels."""

    def differs(self, batch: int) -> bool:
        """Whether it differs from the other variants."""
        return (self.pdl or batch == 1 or not self.own_gemv) and (kernels.HAS_PDL or not self.pdl or SMOKE)


VARIANTS = {
    "cublas": Variant(),
    "dot attention": Variant(dot=True),
    "own GEMV": Variant(dot=True, own_gemv=True),
    "PDL everywhere": Variant(dot=True, own_gemv=True, pdl=True),
}


class Prototype:
    """Uses static buffers and feeds the sampled token back on the device: a step does not need the host."""

    def __init__(
        self, model: Transformer, cache: KVCache, rope: Tensor, table: Tensor, tokens: Tensor, pos: Tensor, most: int
    ) -> None:
        """`most`: keys of the longest sequence."""
        self.model: Any = model
        self.cache, self.table, self.tokens, self.pos, self.most = cache, table, tokens, pos, most
        self.rope = torch.view_as_real(rope).flatten(1).contiguous()  # (positions, d)
        self.variant = Variant()
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """Compute the step's logits, and write its keys and values."""
        model, dtype, page_size = self.model, self.cache.dtype, self.cache.page_size
        pdl = self.variant.pdl and kernels.HAS_PDL
        embedding = model.tok_embeddings.weight
        x = F.embedding(self.tokens.long() % embedding.size(0), embedding).float()
        y = None
        for block, layer in zip(model.layers, self.cache.layers, strict=True):
            k, v = layer.k.transpose(0, 1), layer.v.transpose(0, 1)
            attention, feed_forward = block.attention, block.feed_forward
            h = kernels.add_norm(x, y, block.attention_norm.weight, block.attention_norm.eps, dtype, pdl)
            qkv = self._linear(h, attention.wqkv)
            q = kernels.rope_write(qkv, self.rope, self.table, self.pos, k, v, page_size=page_size, pdl=pdl)
            out = kernels.paged_decode(
                q, k, v, self.table, self.pos, page_size=page_size, most=self.most, dot=self.variant.dot, pdl=pdl
            )
            y = self._linear(out.flatten(1), attention.wo.linear)
            h = kernels.add_norm(x, y, block.ffn_norm.weight, block.ffn_norm.eps, dtype, pdl)
            y = self._linear(kernels.silu_mul(self._linear(h, feed_forward.w13), pdl), feed_forward.w2.linear)
        h = kernels.add_norm(x, y, model.norm.weight, model.norm.eps, dtype, pdl)
        self.logits = self._linear(h, model.output.linear).float()
        return self.logits

    @torch.inference_mode()
    def step(self) -> None:
        """Compute a token for each sequence, and advance."""
        self.tokens.copy_(self.forward().argmax(-1))
        self.pos.add_(1)

    def _linear(self, x: Tensor, linear: Any) -> Tensor:
        if not CUDA:  # weights may be packed
            return linear(x)
        if self.variant.own_gemv and x.size(0) == 1:
            return kernels.gemv(x, linear.dense_weight(), pdl=kernels.HAS_PDL)
        return F.linear(x, linear.dense_weight())


def errors_against(engine: Engine, prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """One decode step of each variant, over the cache that llama_tp filled, against llama_tp's own next step."""
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), SamplingParams(temperature=0, max_new_tokens=20)))
    while engine.scheduler.num_waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    plan, _ = engine.scheduler.plan()
    runner = engine.runner
    for row, index, page in plan.page_updates:
        runner.page_table[row].set(index, page)
    pages = [runner.page_table[chunk.row].pages for chunk in plan.chunks]
    width = max(map(len, pages))
    table, tokens, pos = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in (
            [(row + [0] * width)[:width] for row in pages],
            [chunk.tokens[0] for chunk in plan.chunks],
            [chunk.start for chunk in plan.chunks],
        )
    )
    model = cast(Transformer, runner.model)
    prototype = Prototype(model, runner.cache, runner._rope, table, tokens, pos, int(pos.max()) + 1)
    logits = {}
    for name, prototype.variant in VARIANTS.items():
        logits[name] = prototype.forward()
    ours = runner.execute(plan)
    assert ours is not None
    return {
        name: {"error": relative_error(found, ours), "same_tokens": bool((found.argmax(-1) == ours.argmax(-1)).all())}
        for name, found in logits.items()
    }


CONTEXT = 20 if SMOKE else 512
_PAGE_SIZE = 16
_PAGES = -(-(CONTEXT + 128) // _PAGE_SIZE)
"""Tokens per sequence."""


class _Bed:
    """A model and a cache for prototypes with any batch size up to `most`."""

    def __init__(self, name: str, tp: int, most: int) -> None:
        self.args: ModelArgs = model_args(("tiny" if tp == 1 else "tiny 70b") if SMOKE else name)
        self.tp = tp
        self.model = build_local_model(self.args, StubComm(tp) if tp > 1 else None)
        self.cache = KVCache(
            n_layers=self.args.n_layers,
            num_pages=most * _PAGES,
            page_size=_PAGE_SIZE,
            num_kv_heads=local_kv_heads(self.args, tp, 0),
            head_dim=self.args.head_dim,
            dtype=DTYPE,
            device=DEVICE,
        )
        self.cache._data.normal_()
        self.rope = rope_table(self.args, 4096 if CUDA else 256, DEVICE)

    def prototype(self, batch: int) -> Prototype:
        """The prototype for a batch size, cached."""
        torch.manual_seed(batch)
        table = torch.randperm(self.cache.num_pages, device=DEVICE)[: batch * _PAGES].view(batch, _PAGES).int()
        tokens = torch.randint(0, self.args.vocab_size // self.tp, (batch,), dtype=torch.int32, device=DEVICE)
        pos = torch.full((batch,), CONTEXT, dtype=torch.int32, device=DEVICE)
        return Prototype(self.model, self.cache, self.rope, table, tokens, pos, CONTEXT + 64)


def prototype(r: Report) -> None:
    """What a rewritten step can reach: 7B, then 8B."""
    measure_prototype(r, "7b", (1, 2) if SMOKE else (1, 8, 32, 128))
    if CUDA and r.left() > 10:
        gc.collect()
        torch.cuda.empty_cache()
        measure_prototype(r, "8b", (1, 32, 128))


def measure_prototype(r: Report, name: str, batches: tuple[int, ...], tp: int = 1) -> None:
    """Every variant at every batch size, against its roofline, and its logits' error against the first variant."""
    bed = _Bed(name, tp, batches[-1])
    for batch in batches:
        first: list[Tensor] = []
        for label, variant in VARIANTS.items():
            if variant.differs(batch):

                def measure() -> dict[str, Any]:
                    one = bed.prototype(batch)
                    one.variant = variant
                    first.append(one.forward())
                    return with_roofline(
                        r, {**_time(one), "difference": relative_error(first[-1], first[0])}, bed.args, tp
                    )

                r.guard(f"{name}{f' at TP {tp}' if tp > 1 else ''} B={batch}, {label}", measure)


def _time(one: Prototype) -> dict[str, Any]:
    batch = one.tokens.size(0)
    if CUDA:
        graph = capture(one.step)
        one.pos.fill_(CONTEXT)
        us = call_us(graph.replay, 20)
        one.pos.fill_(CONTEXT)
        loop_ms = _loop_ms(graph, one.tokens)
    else:
        us = call_us(one.step)
        loop_ms = us / 1e3
    rate = round(1e6 * batch / us, 1)
    return {
        "batch": batch,
        "context": CONTEXT + 10,
        "ms": round(us / 1e3, 3),
        "loop_ms": round(loop_ms, 3),
        "tok_s": rate,
    }


def _loop_ms(graph: Any, tokens: Tensor, steps: int = 30) -> float:
    """A step as in a serving loop: replay, copy the ids to pinned memory, read them one step later."""
    host = torch.empty(2, tokens.size(0), dtype=torch.int32, pin_memory=True)
    events = [torch.cuda.Event() for _ in range(2)]
    sync()
    begin = time.perf_counter()
    for i in range(steps):
        graph.replay()
        host[i % 2].copy_(tokens, non_blocking=True)
        events[i % 2].record()
        if i:
            events[(i - 1) % 2].synchronize()
            host[(i - 1) % 2].tolist()
    sync()
    return 1e3 * (time.perf_counter() - begin) / steps


def profile(r: Report) -> None:
    """The prototype's graph by kernel, and the gaps between them."""
    bed = _Bed("7b", 1, 2 if SMOKE else 32)
    for batch, label in ((1, "cublas"), (1, "PDL everywhere"), (2 if SMOKE else 32, "cublas")):

        def measure() -> dict[str, Any]:
            one = bed.prototype(batch)
            one.variant = VARIANTS[label]
            step = capture(one.step).replay if CUDA else one.step
            for _ in range(3):
                step()
            return kernel_times(step)

        if VARIANTS[label].differs(batch):
            r.guard(f"7b B={batch}, {label}", measure)
