"""Prometheus' text format, and the queries of configs/observability/: what they use of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from tests.paths import CONFIGS

_LINE = re.compile(r"([a-zA-Z_:]\w*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Exposition:
    """The text that Prometheus scrapes (text format 0.0.4)."""

    series: dict[str, list[tuple[Labels, float]]]

    @classmethod
    def parse(cls, text: str) -> Exposition:
        series: dict[str, list[tuple[Labels, float]]] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                found = _LINE.fullmatch(line)
                assert found, line
                name, labels, value = found.groups()
                series.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), float(value)))
        return cls(series)

    @property
    def names(self) -> list[str]:
        return list(self.series)

    def has(self, name: str) -> bool:
        return name in self.series

    def labels(self, name: str) -> list[Labels]:
        return [labels for labels, _ in self.series[name]]

    def value(self, name: str, **labels: str) -> float:
        """Of the one series with these labels; 0 if there is none yet."""
        found = [value for own, value in self.series.get(name, []) if labels.items() <= own.items()]
        assert len(found) <= 1, f"{name} {labels} is not one series"
        return found[0] if found else 0.0


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and its PromQL."""
    folder = CONFIGS / "observability"
    for group in yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    dashboard = json.loads((folder / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, labels = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            yield variable["name"], f"sum by ({labels}) ({name})"


def used_by(query: str) -> list[tuple[str, set[str]]]:
    """The metrics that a query selects, each with the labels that the query takes from it.

    Knows as much of PromQL as is used here: selectors, `by` and `on`, whose labels every metric of the query must have.
    """
    grouped = {label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in labels.split(",")}
    rest = re.sub(r"\b(?:by|on) \([^)]*\)", "", query)
    rest = re.sub(r"\[[^]]*\]", "", rest)
    used = []
    for name, labels in re.findall(r"\b([a-zA-Z_]\w*)\b(?!\s*\()(?:\{([^}]*)\})?", re.sub(r'"[^"]*"', '""', rest)):
        if name not in _WORDS and not re.search(r"\{[^}]*\b" + name + r"\b\s*(?:=|!)", rest):
            used.append((name, grouped | set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", labels))))
    assert used, query
    return used


_WORDS = {"and", "or", "unless"}
