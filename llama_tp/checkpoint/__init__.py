"""Weights on disk: readers of foreign formats, the sharded form that is served, and what vouches for it.

Importing this package does no work and imports nothing; the names are in its modules.
"""
