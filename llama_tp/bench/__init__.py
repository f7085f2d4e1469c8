"""What we measure ourselves with. Every benchmark ends with one JSON document on the last line of stdout."""
