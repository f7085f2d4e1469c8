"""The benchmark of the API layer: every route answers every request, token by token, without an engine."""

from __future__ import annotations

import json

import pytest

from llama_tp.bench.api_layer import BODIES, bench_api
from tests.unit.documented_routes import SERVED
from tests.unit.text_fixtures import file_of


def test_every_route_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    bench_api(str(file_of("sentencepiece")), requests=3, new=5, runs=1)
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)["us_per"]
    assert BODIES.keys() == SERVED.dialects.keys()
    assert figures.keys() == {route or "native" for route in BODIES}
    assert all(value > 0 for one in figures.values() for value in one.values())
    assert len(lines) == 1 + len(figures)


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"new": 1.5}, {"runs": "two"}])
def test_a_measurement_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}="):
        bench_api("unread", **{"requests": 1, "new": 1, "runs": 1, **wrong})
