"""The `llama-tp` command: one module per group of commands."""
