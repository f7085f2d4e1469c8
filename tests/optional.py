"""Packages that only some tests need."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

REQUIRED = "REQUIRE_PACKAGES"
"""Set where nothing may be skipped for lack of a package: by scripts/test.sh, which installs them all."""


def imported(name: str) -> Any:
    """The module. Without it the test, or the file, is skipped, or fails if REQUIRE_PACKAGES is set."""
    if os.environ.get(REQUIRED):
        return importlib.import_module(name)
    return pytest.importorskip(name)
