"""Benchmark commands."""

from __future__ import annotations

from typing import Any


def micro(
    checkpoint: str | None = None,
    random_weights: bool = False,
    model: str | None = None,
    forms: str | tuple[str, ...] = ("dense", "int8", "int4"),
    rows: int | tuple[int, ...] = (1, 4, 16),
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    tp: int | str | None = None,
    plot: str | None = None,
) -> None:
    """Measure what this machine can do at best: read bandwidth, matrix products, a model's layers in each format.

    Needs no weights. On several ranks, also all-reduces. Ends with a line of JSON.

    Args:
        checkpoint: a converted checkpoint, for its shapes
        random_weights: accepted as in `bench engine`: weights are random in any case
        model: instead of a checkpoint: a published name such as llama2-7b, or the path of a model_args.json,
            params.json or config.json
        forms: weight formats: dense, int8, int4, int8_groups; those without a kernel on this device are left out;
            on CPUs with PyTorch's kernels and with compiled ones
        rows: rows of the input, tokens of a step
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads per rank; by default its share of the available cores
        tp: number of ranks to start, or auto: one per GPU, one on CPUs; not under torchrun, which starts them itself
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.report import check_plot
    from llama_tp.bench.subject import EngineOptions, choose_subject
    from llama_tp.cli.ranks import run_on_ranks

    check_plot(plot)
    subject = choose_subject(checkpoint, random_weights=random_weights or model is not None, model=model)
    run_on_ranks(tp, subject.args, device)
    from llama_tp.bench.micro import bench_micro

    bench_micro(
        model or subject.name,
        subject.args,
        EngineOptions(dtype=dtype, device=device, threads=threads),
        forms=forms.split(",") if isinstance(forms, str) else forms,
        rows=as_list(rows),
        plot=plot,
    )


def as_list(values: object) -> list[Any]:
    """Values separated by commas, which python-fire has parsed to a tuple, or a single one."""
    return list(values) if isinstance(values, (tuple, list)) else [values]


def engine(
    checkpoint: str | None = None,
    batch: int | tuple[int, ...] = (1, 8, 16, 32),
    prompt: int = 512,
    prefix: int = 0,
    new: int = 128,
    runs: int = 3,
    against: str | None = None,
    dtype: str = "auto",
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_batched_tokens: int = 512,
    speculative_tokens: int = 0,
    speculative_max_batch: int = 2,
    tp: int | str | None = None,
    depth: int | tuple[int, ...] = (),
    neighbour: bool = False,
    random_weights: bool = False,
    model: str | None = None,
    quantization: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure the engine's prefill and decode rates, and their shares of what the machine can do. Runs on all ranks
    under torchrun. Ends with a line of JSON.

    Args:
        checkpoint: a converted checkpoint
        batch: batch sizes, comma-separated
        prompt: tokens per prompt
        prefix: length of the common prefix of all prompts, such as a system prompt
        new: tokens generated per prompt
        runs: measured runs, after one warm-up; batch sizes, contexts and contenders alternate
        against: "transformers" compares with transformers on the same weights, prompts, dtype and threads;
            "deterministic", "no_prefix_cache" and "no_speculation" compare with our engine in deterministic mode, or
            without prefix cache or speculative decoding; "structured" with answers held to a JSON schema;
            "unparallelized" with the model before it is sharded and fused, both without compiled kernels
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether compiled kernels compute, which are waited for
        device: auto, cpu or cuda
        threads: CPU threads per rank; by default its share of the available cores
        max_batched_tokens: maximum tokens per step
        speculative_tokens: tokens per step and sequence to predict from its text so far
        speculative_max_batch: predict none in steps with more running sequences than this
        tp: number of ranks to start, or auto: one per GPU, one on CPUs; not under torchrun, which starts them itself
        depth: more contexts to decode in, comma-separated, such as 0,2048; 0 decodes after a prompt of one token
        neighbour: measure again beside a busy process
        random_weights: instead of a checkpoint; needs --model
        model: the architecture of random weights: a published name such as llama2-7b, or the path of a
            model_args.json, params.json or config.json
        quantization: int8 or int4, of random weights; a checkpoint must have been converted to it
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.report import check_plot
    from llama_tp.bench.subject import EngineOptions, choose_subject
    from llama_tp.cli.ranks import run_on_ranks

    check_plot(plot)
    subject = choose_subject(checkpoint, random_weights=random_weights, model=model, quantization=quantization)
    run_on_ranks(tp, subject.args, device)
    from llama_tp.bench.engine import Plan, bench_engine

    bench_engine(
        subject,
        EngineOptions(
            dtype=dtype,
            compile=compile,
            device=device,
            threads=threads,
            speculative_tokens=speculative_tokens,
            speculative_max_batch=speculative_max_batch,
        ),
        Plan(
            batches=as_list(batch),
            prompt=prompt,
            depths=as_list(depth),
            prefix=prefix,
            new=new,
            runs=runs,
            neighbour=neighbour,
        ),
        against=against,
        max_batched_tokens=max_batched_tokens,
        plot=plot,
    )


def load(
    checkpoint: str | None = None,
    rate: float | str = 0,
    requests: int = 200,
    concurrency: int = 0,
    max_batch_size: int = 16,
    max_batched_tokens: int = 512,
    speculative_tokens: int = 0,
    speculative_max_batch: int = 2,
    seed: int = 0,
    dtype: str = "auto",
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    slo_ttft_ms: float = 1000.0,
    slo_tpot_ms: float = 100.0,
    tp: int | str | None = None,
    neighbour: bool = False,
    random_weights: bool = False,
    model: str | None = None,
    quantization: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure the engine under requests of mixed lengths with random arrivals. Ends with a line of JSON.

    Prompts have 16 to 256 tokens and get 8 to 128 new ones, log-uniform, clipped to the context. Prints the metrics of
    `vllm bench serve`. Runs on all ranks under torchrun.

    Args:
        checkpoint: a converted checkpoint
        rate: requests per second, as a Poisson process; 0 or inf sends all at once
        requests: number of requests
        concurrency: maximum concurrent requests; others are held back; 0 is no limit
        max_batch_size: maximum requests computed together
        max_batched_tokens: maximum tokens per step
        speculative_tokens: tokens per step and sequence to predict from its text so far
        speculative_max_batch: predict none in steps with more running sequences than this
        seed: seed for prompts, lengths and arrivals
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether compiled kernels compute, which are waited for
        device: auto, cpu or cuda
        threads: CPU threads per rank; by default its share of the available cores
        slo_ttft_ms: maximum time to first token for goodput
        slo_tpot_ms: maximum time per output token after the first for goodput
        tp: number of ranks to start, or auto: one per GPU, one on CPUs; not under torchrun, which starts them itself
        neighbour: measure again beside a busy process
        random_weights: instead of a checkpoint; needs --model
        model: the architecture of random weights: a published name such as llama2-7b, or the path of a
            model_args.json, params.json or config.json
        quantization: int8 or int4, of random weights; a checkpoint must have been converted to it
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.report import check_plot
    from llama_tp.bench.subject import EngineOptions, choose_subject
    from llama_tp.cli.ranks import run_on_ranks

    check_plot(plot)
    subject = choose_subject(checkpoint, random_weights=random_weights, model=model, quantization=quantization)
    run_on_ranks(tp, subject.args, device)
    from llama_tp.bench.engine_load import bench_load
    from llama_tp.bench.workload import Load, Slo, parse_rate

    bench_load(
        subject,
        EngineOptions(
            dtype=dtype,
            compile=compile,
            device=device,
            threads=threads,
            speculative_tokens=speculative_tokens,
            speculative_max_batch=speculative_max_batch,
        ),
        Load(requests=requests, rate=parse_rate(rate), concurrency=concurrency, seed=seed),
        Slo(slo_ttft_ms, slo_tpot_ms),
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        neighbour=neighbour,
        plot=plot,
    )


def checkpoint(
    size_gb: float = 2.0, runs: int = 3, folder: str | None = None, quantize: str | None = None, plot: str | None = None
) -> None:
    """Measure converting, exporting, loading and verifying random weights, next to cp and a raw read of the same bytes,
    and the peaks of memory. Ends with a line of JSON.

    Args:
        size_gb: approximate size of the weights, in GB; five times this is needed on disk
        runs: measured runs; contenders take turns, and medians are reported
        folder: where to write, by default TMPDIR
        quantize: int8 or int4, to measure such a conversion as well; int4 takes minutes per GB
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.checkpoint import bench_checkpoint
    from llama_tp.bench.report import check_plot

    check_plot(plot)
    bench_checkpoint(folder, size_gb=size_gb, runs=runs, quantize=quantize, plot=plot)


def comm(batch: int = 16, rounds: int = 2000, plot: str | None = None) -> None:
    """Measure communication between ranks, under torchrun on one host: publishing a plan, an all-reduce of 8 KB.

    Args:
        batch: sequences in the plan
        rounds: rounds per measurement
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.comm import bench_comm
    from llama_tp.bench.report import check_plot

    check_plot(plot)
    bench_comm(batch=batch, rounds=rounds, plot=plot)


def api(tokenizer: str, requests: int = 200, new: int = 64, runs: int = 5, plot: str | None = None) -> None:
    """Measure the API layer without an engine: parsing, tokenizing, detokenizing, formatting. Ends with a line of JSON.

    CPU time of a thread, so other processes hardly matter. Answers are streamed, a token per event.

    Args:
        tokenizer: a tokenizer's file, or a folder with one
        requests: requests per run
        new: tokens per answer
        runs: runs of each route, alternating; the medians are printed
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.api_layer import bench_api
    from llama_tp.bench.report import check_plot

    check_plot(plot)
    bench_api(tokenizer, requests=requests, new=new, runs=runs, plot=plot)


def quality(
    checkpoint: str,
    against: str | None = None,
    new: int = 64,
    step: int = 64,
    dtype: str = "auto",
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    plot: str | None = None,
) -> None:
    """Measure perplexity on a fixed text, and agreement with a second checkpoint. Ends with a line of JSON.

    The text comes with llama-tp: some 2,700 tokens of prose, dialogs and code, in windows of 512. Needs memory for both
    models.

    Args:
        checkpoint: a converted checkpoint, with its tokenizer
        against: the same model in another form, such as the one it was quantized from: adds the mean KL divergence from
            it, the share of positions with the same most probable token, and how long greedy outputs are the same
        new: tokens generated for each of 8 prompts; only with `against`
        step: tokens of the text computed at a time, 1 to 512; few are computed as in decoding, where inputs of
            quantized layers may be rounded in another way than for many
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether compiled kernels compute, which are waited for
        device: auto, cpu or cuda
        threads: CPU threads; by default all available cores
        plot: a .png, .svg or .pdf to draw
    """
    from llama_tp.bench.quality import bench_quality
    from llama_tp.bench.report import check_plot
    from llama_tp.bench.subject import EngineOptions

    check_plot(plot)
    options = EngineOptions(dtype=dtype, compile=compile, device=device, threads=threads)
    bench_quality(checkpoint, options, against=against, new=new, step=step, plot=plot)
