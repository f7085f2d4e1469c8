"""Download Meta's weights: download_model.py --model_name meta-llama/Llama-2-7b [--revision R] [--output model]."""

from llama_tp.checkpoint.command import run_command
from llama_tp.checkpoint.hub import download

if __name__ == "__main__":
    run_command(download)
