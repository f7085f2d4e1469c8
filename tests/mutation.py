"""Bodies that are almost valid: a valid one with a field deleted, renamed, replaced or buried, at any depth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.schema_strategy import anything

Json = st.SearchStrategy[Any]
Place = tuple[Any, Any]
"""A container and the key or index of one of its values."""

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    "",
    "x" * 5000,
    0,
    -1,
    10**9,
    2**63,
    2**64,
    10**400,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "\ud800",
    "\x00",
    [],
    {},
    [0] * 3000,
    ["x" * 300] * 100,
    {str(key): 1 for key in range(2000)},
    [[]],
    [{}],
    {"type": "text"},
)
"""Values that a careless parser trips over."""


def places(value: Any) -> Iterator[Place]:
    """Where the values inside a value are."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@st.composite
def mutated(draw: Any, bodies: Json) -> Any:
    """A body with one to three changes."""
    body = copy.deepcopy(draw(bodies))
    for _ in range(draw(st.integers(1, 3))):
        _mutate(draw, body)
    return body


def _mutate(draw: Any, body: dict[str, Any]) -> None:
    if not (found := list(places(body))):
        body[draw(st.text(max_size=8))] = draw(anything)
        return
    container, key = draw(st.sampled_from(found))
    change = draw(st.sampled_from(["delete", "replace", "replace", "bury", "rename", "borrow"]))
    if change == "delete":
        del container[key]
    elif change == "replace":
        container[key] = draw(anything | st.sampled_from(HOSTILE).map(copy.deepcopy))
    elif change == "bury":
        container[key] = _nested(container[key], draw(st.integers(1, 40)))
    elif change == "borrow":
        container[key] = copy.deepcopy(draw(st.sampled_from(found))[0])
    elif isinstance(container, dict):
        container[draw(st.text(max_size=8) | st.just("x" * 5000) | st.just(key.upper()))] = container.pop(key)
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value
