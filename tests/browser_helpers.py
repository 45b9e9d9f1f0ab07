"""What tests in a real Chromium share: how it is started, what it may complain of, and logging in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

from playwright.sync_api import Page, expect

FLAGS = (
    "--no-sandbox",  # as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: Milliseconds until something that should be on the page must be there.
PATIENCE = 10_000

#: What Chromium says of answers that a test provokes, and of pictures still on their way when the server stops.
EXPECTED = re.compile(
    r"(status of|Error Code) (401|409|422|429|503)|ERR_CONNECTION_REFUSED|^htmx:(sendError|afterRequest)$"
)

OpenPage = Callable[..., Page]


def chromium() -> str | None:
    """Return an installed browser; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def log_in(page: Page, name: str, token: str) -> None:
    """Log in by keyboard alone: the first field has the focus."""
    expect(page.locator('input[name="name"]')).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/review*")
