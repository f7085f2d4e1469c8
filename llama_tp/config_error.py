"""What is wrong with a configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """One or more settings are invalid. Each problem is one line that names key, value, constraint and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))
