"""Commands that run a model in the terminal."""

from __future__ import annotations


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
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    speculative_tokens: int = 0,
    tp: int | str | None = None,
) -> None:
    """Continue a prompt and print the text as it is generated. Runs on all ranks under torchrun.

    Args:
        checkpoint: a converted checkpoint
        prompt: text to continue
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        max_new_tokens: maximum number of tokens to generate
        temperature: 0 is greedy
        top_p: sample from the most likely tokens with this total probability
        top_k: sample from this many most likely tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether compiled kernels compute; true waits until they are compiled
        device: auto, cpu or cuda
        threads: CPU threads per rank; by default its share of the available cores
        speculative_tokens: tokens per step to predict from the text so far, such as 4; faster for texts that repeat
        tp: number of ranks to start, or auto: one per GPU, one on CPUs; not under torchrun, which starts them itself
    """
    from llama_tp.cli.ranks import run_on_ranks

    run_on_ranks(tp, checkpoint, device)
    from llama_tp.cli.console import run_console
    from llama_tp.engine.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    run_console(
        checkpoint,
        lambda console: console.complete(str(prompt), params),
        tokenizer=tokenizer,
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
        speculative_tokens=speculative_tokens,
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
    compile: bool | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    speculative_tokens: int = 0,
    tp: int | str | None = None,
) -> None:
    """Chat with a model in the terminal; an empty line or Ctrl-D ends it. Runs on all ranks under torchrun.

    Args:
        checkpoint: a converted checkpoint
        tokenizer: tokenizer.model, tokenizer.json or a folder with one; by default the checkpoint's
        system: a system message to begin with
        chat_format: auto, llama2, llama3, chatml or jinja
        max_new_tokens: maximum tokens per answer
        temperature: 0 is greedy
        top_p: sample from the most likely tokens with this total probability
        top_k: sample from this many most likely tokens; 0 is all
        seed: makes sampling reproducible
        dtype: auto, bfloat16, float16 or float32
        compile: auto, true or false: whether compiled kernels compute; true waits until they are compiled
        device: auto, cpu or cuda
        threads: CPU threads per rank; by default its share of the available cores
        speculative_tokens: tokens per step to predict from the text so far, such as 4; faster for texts that repeat
        tp: number of ranks to start, or auto: one per GPU, one on CPUs; not under torchrun, which starts them itself
    """
    from llama_tp.cli.ranks import run_on_ranks

    run_on_ranks(tp, checkpoint, device)
    from llama_tp.cli.console import run_console
    from llama_tp.engine.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    run_console(
        checkpoint,
        lambda console: console.chat(chat_format, params, system=system),
        tokenizer=tokenizer,
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
        speculative_tokens=speculative_tokens,
    )
