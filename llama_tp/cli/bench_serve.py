"""`llama-tp bench serve`: a server under load."""

from __future__ import annotations

from llama_tp.cli.command import allow_slow_shutdown
from llama_tp.threads import available_cores


def serve(
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    rate: float | str = 0,
    requests: int = 200,
    concurrency: int = 0,
    max_batch_size: int = 16,
    max_batched_tokens: int = 512,
    tp: int | str = 1,
    threads: int | None = None,
    runs: int = 2,
    seed: int = 0,
    dtype: str = "auto",
    compile: bool | str = "auto",
    api: str | None = None,
    slo_ttft_ms: float = 1000.0,
    slo_tpot_ms: float = 100.0,
    handler: str | None = None,
    properties: str | None = None,
    log_config: str | None = None,
    timeout_s: float = 1200.0,
    url: str | None = None,
    vocab_size: int = 32000,
    served_model: str | None = None,
    max_seq_len: int | None = None,
    eos_token_id: int | None = None,
    api_key_file: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure a running server (--url), or the overhead of TorchServe on a CPU: the same load through it and the engine
    alone, alternating. Ends with a line of JSON.

    The load is that of `bench load`. At a rate that the engine can sustain, both have the same throughput: compare
    latencies there, and throughput at a rate of 0. Without --url, needs memory for the model twice.

    Args:
        checkpoint: a converted checkpoint; not with --url
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        rate: requests per second; 0 or inf sends all at once
        requests: number of requests
        concurrency: maximum concurrent requests; others are held back; 0 is no limit
        max_batch_size: maximum requests computed together
        max_batched_tokens: maximum tokens per step
        tp: number of ranks, or auto: one on CPUs
        threads: CPU threads per rank; by default its share of the available cores
        runs: runs of each; run n uses seed + n
        seed: seed for prompts, lengths and arrivals
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether decode steps run as compiled kernels, which are waited for
        api: native, openai (v1/completions), or native,openai to compare them; by default native, but openai with the
            url of an OpenAI-compatible API
        slo_ttft_ms: maximum time to first token for goodput
        slo_tpot_ms: maximum time per output token after the first for goodput
        handler: the handler file; by default llama-tp's own
        properties: TorchServe's config.properties; by default as for `serve`
        log_config: TorchServe's log4j2.xml; by default as for `serve`
        timeout_s: seconds to wait for the server to start
        url: of a model on TorchServe, such as http://127.0.0.1:8080/predictions/llama, or of an OpenAI-compatible API
            as its clients take it, with /v1 at the end (vLLM, the server of llama.cpp, ...); only the settings of the
            load and of the API apply then
        vocab_size: with --url, prompts are random ids below this; common words if the server takes only text
        served_model: with the url of an OpenAI-compatible API, which of several models
        max_seq_len: with the url of an OpenAI-compatible API, the longest sequence, if the server does not say
        eos_token_id: with the url of an OpenAI-compatible API, an end token to forbid by logit_bias, for servers that
            follow neither ignore_eos nor min_tokens
        api_key_file: with --url, a file with the server's API key
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.report import check_plot

    check_plot(plot)
    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    from llama_tp.bench.workload import Load, Slo, parse_rate

    load = Load(requests=requests, rate=parse_rate(rate), concurrency=concurrency, seed=seed)
    slo = Slo(slo_ttft_ms, slo_tpot_ms)
    if url is not None:
        if checkpoint is not None:
            raise ValueError(f"url={url!r} is of a running server; leave the checkpoint {checkpoint} out")
        from llama_tp.bench.openai_server import Hints
        from llama_tp.bench.running_server import bench_running

        hints = Hints(
            served_model=served_model, max_seq_len=max_seq_len, vocab_size=vocab_size, eos_token_id=eos_token_id
        )
        bench_running(url, load, slo, api=api, runs=runs, hints=hints, api_key_file=api_key_file, plot=plot)
        return
    if checkpoint is None:
        raise ValueError("give a converted checkpoint, or the --url of a running server")
    from llama_tp.bench.api import parse_apis
    from llama_tp.bench.serve import Setup, bench_serve
    from llama_tp.cli.ranks import AUTO, resolve_size
    from llama_tp.resources import HANDLER, LOG_CONFIG, PROPERTIES, resource
    from llama_tp.text.tokenizer_files import find_tokenizer

    size = resolve_size(tp, checkpoint, "cpu") if tp == AUTO else tp
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"tp={size!r} must be an integer of at least 1, or {AUTO}")
    allow_slow_shutdown()
    bench_serve(
        Setup(
            checkpoint=checkpoint,
            tokenizer=tokenizer or str(find_tokenizer(checkpoint)),
            max_batch_size=max_batch_size,
            max_batched_tokens=max_batched_tokens,
            tp=size,
            threads=max(1, available_cores() // size) if threads is None else threads,
            dtype=dtype,
            compile=compile,
        ),
        load,
        slo,
        apis=parse_apis(api or "native"),
        runs=runs,
        handler=handler or resource(HANDLER),
        properties=properties or resource(PROPERTIES),
        log_config=log_config or resource(LOG_CONFIG),
        timeout_s=timeout_s,
        plot=plot,
    )
