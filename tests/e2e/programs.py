"""Programs of the machine that some tests need."""

from __future__ import annotations

import os
import shutil

import pytest


def program(*names: str, remedy: str) -> str:
    """The path of the first of these that is installed. Without any the test is skipped, or fails if the variable
    REQUIRE_PROGRAMS is set, as in .ci/run."""
    places = f"{os.environ.get('PATH', '')}:/usr/sbin"
    found = next(filter(None, (shutil.which(name, path=places) for name in names)), None)
    if found is None:
        if os.environ.get("REQUIRE_PROGRAMS"):
            pytest.fail(remedy)
        pytest.skip(remedy)
    return found
