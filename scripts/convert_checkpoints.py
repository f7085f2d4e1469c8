"""Convert Meta's original weights: see `llama_tp.checkpoint.convert`.

torchrun --nnodes 1 --nproc_per_node N scripts/convert_checkpoints.py --original_ckpt_dir D \
    --tokenizer_path D/tokenizer.model --model_parallel_size M \
    --save_checkpoint_dir converted_checkpoints --max_seq_len 512 --max_batch_size 2
"""

from llama_tp.checkpoint.convert import convert
from llama_tp.cli.command import run_command

if __name__ == "__main__":
    run_command(convert)
