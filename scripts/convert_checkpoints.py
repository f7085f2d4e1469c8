"""Convert original weights under torchrun, with the flags of the original example: `llama-tp convert` by another name.

torchrun --nnodes 1 --nproc_per_node N scripts/convert_checkpoints.py --original_ckpt_dir D \
    --tokenizer_path D/tokenizer.model --model_parallel_size M \
    --save_checkpoint_dir converted_checkpoints --max_seq_len 512 --max_batch_size 2
"""

from __future__ import annotations

from llama_tp.cli import checkpoints
from llama_tp.cli.command import run_command


def convert(
    original_ckpt_dir: str,
    tokenizer_path: str | None = None,
    model_parallel_size: int | None = None,
    save_checkpoint_dir: str = "converted_checkpoints",
    max_seq_len: int = 2048,
    max_batch_size: int = 32,
    model_args_path: str = "./model_args.json",
    tp_max: int = 8,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert original weights, and write model_args.json into the checkpoint and to `model_args_path`.

    Args:
        original_ckpt_dir: what `llama-tp convert` takes: a folder with Meta's shards, a Hugging Face model or
            consolidated.safetensors, a GGUF file, or a repository of the Hugging Face hub
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or a folder with one; by default that of the
            originals
        model_parallel_size: required number of Meta's shards, as a check; by default any number
        save_checkpoint_dir: folder to write
        max_seq_len: default context length when serving, written to model_args.json
        max_batch_size: default maximum batch size when serving, written to model_args.json
        model_args_path: file for a second copy of model_args.json
        tp_max: largest tensor-parallel size at which each rank reads only its own bytes; larger groups work, too
        dtype: bfloat16, float16 or float32, to which all weights are rounded; by default that of the originals
        overwrite: replace what is in save_checkpoint_dir
    """
    checkpoints.convert(
        original_ckpt_dir,
        save_checkpoint_dir,
        tokenizer=tokenizer_path,
        model_parallel_size=model_parallel_size,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        model_args_path=model_args_path,
        tp_max=tp_max,
        dtype=dtype,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    run_command(convert)
