"""The `llama-tp` command: one module for each group of commands."""
