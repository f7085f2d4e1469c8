"""Download Meta's weights: download_model.py --model_name meta-llama/Llama-2-7b [--revision R] [--output model]."""

from llama_tp.cli.checkpoints import download
from llama_tp.cli.command import run_command

if __name__ == "__main__":
    run_command(download)
