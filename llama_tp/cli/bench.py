"""Commands that measure."""

from __future__ import annotations

from llama_tp.cli.command import allow_slow_shutdown
from llama_tp.threads import available_cores


def engine(
    checkpoint: str,
    batch: int | tuple[int, ...] = (1, 4, 8, 16),
    prompt: int = 128,
    prefix: int = 0,
    new: int = 64,
    runs: int = 3,
    against: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_batched_tokens: int = 512,
) -> None:
    """Measure prefill and decode rates of the engine. Under torchrun, on all its ranks. Ends with a line of JSON.

    Args:
        checkpoint: a converted checkpoint
        batch: batch sizes, comma-separated
        prompt: tokens of each prompt
        prefix: tokens that all prompts begin with alike, as those with one system prompt do
        new: tokens generated for each prompt
        runs: measured runs of each, after one that warms up; batch sizes and contenders take turns
        against: "transformers" runs it interleaved, on the same weights, prompts, dtype and threads; "deterministic"
            and "no_prefix_cache" run our own engine in deterministic mode, and without the prefix cache
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads of each rank; by default its share of the available cores
        max_batched_tokens: tokens of one step
    """
    from llama_tp.bench.engine import bench_engine

    bench_engine(
        checkpoint,
        batches=list(batch) if isinstance(batch, (tuple, list)) else [batch],
        prompt=prompt,
        prefix=prefix,
        new=new,
        runs=runs,
        against=against,
        dtype=dtype,
        device=device,
        threads=threads,
        max_batched_tokens=max_batched_tokens,
    )


def load(
    checkpoint: str,
    rate: float | str = 0,
    requests: int = 200,
    concurrency: int = 0,
    max_batch_size: int = 16,
    max_batched_tokens: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    slo_ttft_ms: float = 1000.0,
    slo_tpot_ms: float = 100.0,
) -> None:
    """Measure the engine under requests of mixed lengths that arrive at random. Ends with a line of JSON.

    Prompts have 16 to 256 tokens and 8 to 128 new ones, log-uniform, clipped to the context. Prints what `vllm bench
    serve` does. Under torchrun, on all its ranks.

    Args:
        checkpoint: a converted checkpoint
        rate: requests a second, as a Poisson process; 0 or inf is all at once
        requests: number of requests
        concurrency: requests at a time, the others are held back; 0 is no limit
        max_batch_size: requests that are computed together
        max_batched_tokens: tokens of one step
        seed: of prompts, lengths and arrivals
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads of each rank; by default its share of the available cores
        slo_ttft_ms: time to first token of a request that counts in the goodput
        slo_tpot_ms: and its time per token after that
    """
    from llama_tp.bench.engine_load import bench_load
    from llama_tp.bench.workload import Load, Slo, parse_rate

    bench_load(
        checkpoint,
        Load(requests=requests, rate=parse_rate(rate), concurrency=concurrency, seed=seed),
        Slo(slo_ttft_ms, slo_tpot_ms),
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def comm(batch: int = 16, rounds: int = 2000) -> None:
    """Measure what ranks pay to talk, under torchrun on one host: publishing a plan, an all-reduce of 8 KB.

    Args:
        batch: sequences in the plan
        rounds: measured rounds of each
    """
    from llama_tp.bench.comm import bench_comm

    bench_comm(batch=batch, rounds=rounds)


def serve(
    checkpoint: str,
    tokenizer: str | None = None,
    rate: float | str = 0,
    requests: int = 200,
    concurrency: int = 0,
    max_batch_size: int = 16,
    max_batched_tokens: int = 512,
    tp: int = 1,
    threads: int | None = None,
    runs: int = 2,
    seed: int = 0,
    dtype: str = "auto",
    slo_ttft_ms: float = 1000.0,
    slo_tpot_ms: float = 100.0,
    handler: str | None = None,
    properties: str | None = None,
    log_config: str | None = None,
    timeout_s: float = 1200.0,
) -> None:
    """Measure what TorchServe leaves of the engine on a CPU: one load through both, in turns. Ends with a line of JSON.

    The load is that of `bench load`. At a rate that the engine can keep up with, both have the
    same throughput: compare latencies there, and throughputs at a rate of 0. Holds the model twice in memory.

    Args:
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        rate: requests a second; 0 or inf is all at once
        requests: of the load
        concurrency: requests at a time, the others are held back; 0 is no limit
        max_batch_size: requests that are computed together
        max_batched_tokens: tokens of one step
        tp: ranks
        threads: of each rank; by default all cores, shared out
        runs: times that each takes its turn; run n has the prompts of seed + n
        seed: of prompts, lengths and arrivals
        dtype: auto, bfloat16, float16 or float32
        slo_ttft_ms: time to first token of a request that counts in the goodput
        slo_tpot_ms: and its time per token after that
        handler: the handler file; by default llama-tp's own
        properties: TorchServe's config.properties; by default as for `serve`
        log_config: TorchServe's log4j2.xml; likewise
        timeout_s: of starting the server
    """
    from llama_tp.bench.serve import Setup, bench_serve
    from llama_tp.bench.workload import Load, Slo, parse_rate
    from llama_tp.resources import HANDLER, LOG_CONFIG, PROPERTIES, resource
    from llama_tp.text.tokenizer_files import find_tokenizer

    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    if not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp={tp!r} must be an integer of at least 1")
    allow_slow_shutdown()
    bench_serve(
        Setup(
            checkpoint=checkpoint,
            tokenizer=tokenizer or str(find_tokenizer(checkpoint)),
            max_batch_size=max_batch_size,
            max_batched_tokens=max_batched_tokens,
            tp=tp,
            threads=max(1, available_cores() // tp) if threads is None else threads,
            dtype=dtype,
        ),
        Load(requests=requests, rate=parse_rate(rate), concurrency=concurrency, seed=seed),
        Slo(slo_ttft_ms, slo_tpot_ms),
        runs=runs,
        handler=handler or resource(HANDLER),
        properties=properties or resource(PROPERTIES),
        log_config=log_config or resource(LOG_CONFIG),
        timeout_s=timeout_s,
    )
