"""Get the demo weights, SmolLM2-135M-Instruct: demo_weights.py --output DIR [--model_parallel_size M]."""

from llama_tp.checkpoint.demo import fetch_demo
from llama_tp.cli.command import run_command


def demo_weights(output: str = "model/smollm2", model_parallel_size: int = 1) -> None:
    """Write the weights as Meta-style shards, with the tokenizer, and print the folder.

    Args:
        output: folder to write
        model_parallel_size: number of shards, as Meta's larger models have several
    """
    print(fetch_demo(output, model_parallel_size=model_parallel_size))


if __name__ == "__main__":
    run_command(demo_weights)
