"""Debian's Chromium, driven by playwright, for tests that look at a page."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@contextmanager
def chromium_page(offline: bool = False, **context: Any) -> Iterator[Any]:
    """A playwright page in a browser of its own; skips the test where there is no Chromium.

    offline: no network at all, loopback included. context: of playwright's new_context, as `viewport` and
    `color_scheme`. What the page writes to the console as an error, or throws, is in `page.problems`.
    """
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"{CHROMIUM} is missing (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page: Any = browser.new_context(offline=offline, **context).new_page()
            page.problems = []
            page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            yield page
        finally:
            browser.close()
