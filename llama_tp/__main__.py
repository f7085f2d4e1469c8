"""`python -m llama_tp`: the same as `llama-tp`, in a form that torchrun can start."""

from llama_tp.cli import main

main()
