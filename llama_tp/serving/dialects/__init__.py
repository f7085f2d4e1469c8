"""The APIs that clients speak: bytes in, `GenerationRequest`s; output in, bytes. Nothing else."""
