"""The `llama-tp` command. Each command is a thin door to the library; `llama-tp COMMAND --help` explains it."""

from __future__ import annotations

import os
from typing import Any

from llama_tp.command import run_command


def download(model_name: str, revision: str | None = None, output: str = "model") -> None:
    """Fetch Meta's original weights from the Hugging Face hub, and print the folder they are in.

    Args:
        model_name: such as meta-llama/Llama-2-7b
        revision: branch, tag or commit
        output: folder to download into
    """
    from llama_tp.checkpoint import hub

    print(hub.download(model_name, revision=revision, output=output))


def verify(checkpoint: str) -> None:
    """Compare every file of a converted checkpoint with the sha256 in its manifest.

    Args:
        checkpoint: the folder that scripts/convert_checkpoints.py wrote
    """
    from llama_tp.checkpoint.verify import verify as verify_folder

    manifest = verify_folder(checkpoint)
    print(f"{checkpoint}: {len(manifest.files)} files are as they were written")


def plan(model_args: str) -> None:
    """Print the legal tensor-parallel sizes of a model, and what a rank holds at each.

    Args:
        model_args: model_args.json or Meta's params.json (with a vocab_size)
    """
    from llama_tp.config import ModelArgs
    from llama_tp.parallel.plan import legal_tp_sizes, num_parameters_of_rank

    args = ModelArgs.load(model_args)
    if args.vocab_size < 1:
        raise ValueError(
            f"{model_args}: vocab_size={args.vocab_size} leaves the vocabulary open; "
            "use the model_args.json of a converted checkpoint"
        )
    print(f"{num_parameters_of_rank(args, 1) / 1e9:.2f} billion parameters. One rank holds, in bfloat16:")
    print(f"{'ranks':>6} {'weights':>12} {'KV cache of a token':>21} {'... of one full context':>24}")
    for size in legal_tp_sizes(args):
        weights = 2 * num_parameters_of_rank(args, size)
        token = 2 * 2 * args.n_layers * max(1, args.n_kv_heads // size) * args.head_dim
        context = token * args.max_seq_len
        print(f"{size:>6} {weights / 2**30:>8.2f} GiB {token / 2**10:>17.1f} KiB {context / 2**20:>20.1f} MiB")


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
) -> None:
    """Continue a prompt and print the text as it comes. Under torchrun, on all its ranks.

    Args:
        checkpoint: a converted checkpoint
        prompt: text to continue
        tokenizer: tokenizer.model or tokenizer.json; by default the one beside or in the checkpoint
        max_new_tokens: stop after so many tokens
        temperature: 0 is greedy
        top_p: sample from the most probable tokens that add up to this
        top_k: sample from so many most probable tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
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
) -> None:
    """Talk to a chat model in the terminal; an empty line or Ctrl-D ends it. Under torchrun, on all its ranks.

    Args:
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model or tokenizer.json; by default the one beside or in the checkpoint
        system: a system message to begin with
        chat_format: auto, llama2, llama3, chatml or jinja
        max_new_tokens: of one answer
        temperature: 0 is greedy
        top_p: sample from the most probable tokens that add up to this
        top_k: sample from so many most probable tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
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
    )


def package(
    config: str,
    checkpoint: str,
    tokenizer: str,
    model_store: str = "model_store",
    model_name: str = "llama",
    handler: str = "handler/llama_handler.py",
) -> None:
    """Build the folder in the model store that TorchServe serves, with torch-model-archiver.

    Args:
        config: the model-config.yaml to serve with
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model or tokenizer.json
        model_store: TorchServe's model store
        model_name: the model's name in URLs
        handler: the handler file
    """
    from llama_tp.torchserve.archive import build_archive

    folder = build_archive(
        model_name=model_name,
        config_file=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        handler=handler,
        model_store=model_store,
    )
    print(folder)


def serve(
    model_store: str = "model_store",
    model_name: str = "llama",
    port: int = 8080,
    run_dir: str = ".",
    properties: str = "configs/config.properties",
    log_config: str = "configs/log4j2.xml",
    timeout_s: float = 1200.0,
) -> None:
    """Start TorchServe in the background and return when the model has generated its first token.

    Args:
        model_store: TorchServe's model store
        model_name: the model to serve
        port: of the inference API; management and metrics are the next two
        run_dir: where logs/ goes
        properties: TorchServe's config.properties
        log_config: TorchServe's log4j2.xml
        timeout_s: give up after so many seconds
    """
    from llama_tp.torchserve.server import TorchServe

    server = TorchServe(
        model_store=model_store,
        model_name=model_name,
        run_dir=run_dir,
        port=port,
        properties=properties,
        log_config=log_config,
    )
    server.start()
    try:
        server.wait_until_ready(timeout_s)
    except BaseException:
        server.stop()
        raise
    print(f"{model_name} is ready at {server.url}; logs are in {server.run_dir / 'logs'}")


def stop(port: int = 8080) -> None:
    """Stop the TorchServe that `llama-tp serve` started on this port, and all its ranks.

    Args:
        port: of its inference API
    """
    from llama_tp.torchserve.server import TorchServe

    server = TorchServe(model_store=".", model_name="", run_dir=".", port=port, properties="", log_config="")
    print("stopped" if server.stop() else f"no server of ours is running on port {port}")


def bench_engine(
    checkpoint: str,
    batch: int | tuple[int, ...] = (1, 4, 8, 16),
    prompt: int = 128,
    new: int = 64,
    runs: int = 3,
    against: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_batched_tokens: int = 512,
) -> None:
    """Measure prefill and decode rates of the engine. Under torchrun, on all its ranks. Ends with a line of JSON.

    Args:
        checkpoint: a converted checkpoint
        batch: batch sizes, comma-separated
        prompt: tokens of each prompt
        new: tokens generated for each prompt
        runs: measured runs of each, after one that warms up
        against: "transformers" runs it interleaved, on the same weights, prompts, dtype and threads
        dtype: auto, bfloat16, float16 or float32
        device: auto, cpu or cuda
        max_batched_tokens: tokens of one step
    """
    from llama_tp.bench.engine import bench_engine as bench

    bench(
        checkpoint,
        batches=[batch] if isinstance(batch, int) else list(batch),
        prompt=prompt,
        new=new,
        runs=runs,
        against=against,
        dtype=dtype,
        device=device,
        max_batched_tokens=max_batched_tokens,
    )


COMMANDS: dict[str, Any] = {
    "download": download,
    "verify": verify,
    "plan": plan,
    "generate": generate,
    "chat": chat,
    "package": package,
    "serve": serve,
    "stop": stop,
    "bench": {"engine": bench_engine},
}


def main() -> None:
    """Entry point of `llama-tp` and `python -m llama_tp`."""
    os.environ.setdefault("PAGER", "cat")  # fire shows help in a pager
    run_command(COMMANDS, name="llama-tp")
