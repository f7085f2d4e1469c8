"""Makes docs/chat.png: asks a running server through its chat page, and takes a picture of the last chat.

python scripts/chat_screenshot.py http://localhost:8080/predictions/llama/1.0/chat docs/chat.png

Needs playwright and a chromium on PATH. The answers are those of the model that is served, at temperature 0.
"""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHATS = (
    ("How many continents are there?",),
    ("What is the capital of Italy?",),
    ("What is the capital of France?", "Write a Python function that reverses a string."),
)
WIDTH, HEIGHT, SCALE = 1100, 730, 2
TIMEOUT_MS = 300_000


def main(url: str, path: str) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("there is no chromium on PATH; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(url)
        _set_temperature(page, "0")
        for chat in CHATS:
            page.get_by_role("button", name="New chat", exact=True).click()
            for question in chat:
                _ask(page, question)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=path)
        browser.close()


def _set_temperature(page: Page, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill(value)
    page.get_by_role("button", name="Done").click()


def _ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send", exact=True).wait_for(timeout=TIMEOUT_MS)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
