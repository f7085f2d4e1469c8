"""The APIs that clients speak: from bytes to `GenerationRequest`s, and from output to bytes. Nothing else."""
