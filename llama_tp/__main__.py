"""`python -m llama_tp`: the same as `llama-tp`, in a form that torchrun can start."""

from llama_tp.cli.main import main

main()
