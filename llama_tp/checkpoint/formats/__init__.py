"""Foreign checkpoints, read one tensor at a time."""
