"""Tools: how models are told of them, and how they write calls."""
