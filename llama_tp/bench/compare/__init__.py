"""`llama-tp bench compare`: our engine and others on the same weights, each in a process of its own, in turns."""
