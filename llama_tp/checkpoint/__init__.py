"""Weights on disk: readers for foreign formats, the sharded form that is served, and its verification."""
