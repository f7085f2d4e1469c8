"""The browser that tests drive: Debian's chromium, or any other of its family on PATH. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REMEDY = "no browser on PATH; on Debian: apt install chromium (scripts/test.sh does so as root or with sudo)"


def executable() -> str:
    """The browser's path. Without one the test is skipped, or fails if REQUIRE_BROWSER is set, as in .ci/run."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(REMEDY)
        pytest.skip(REMEDY)
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
