"""Benchmarks. Every benchmark prints one JSON document on the last line of stdout."""
