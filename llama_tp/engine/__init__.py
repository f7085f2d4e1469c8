"""The engine: requests in, token events out. The leader decides, every rank executes."""
