"""What tests in a real Chromium share: how it is started, what it may complain of, and logging in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, expect

FLAGS = (
    "--no-sandbox",  # as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--renderer-process-limit=1",  # or every page of a site gets a new process
    "--process-per-site",
)
#: Milliseconds until something that should be on the page must be there.
PATIENCE = 30_000

#: What Chromium says of answers that a test provokes, and of pictures still on their way when the server stops.
EXPECTED = re.compile(
    r"(status of|Error Code) (401|409|410|422|429|503)|ERR_CONNECTION_REFUSED|^htmx:(sendError|afterRequest)$"
)

OpenPage = Callable[..., Page]

#: Settings that a page can change, as a new one has them.
PLAIN_SETTINGS: dict[str, Any] = {"color_scheme": "light", "viewport": {"width": 1280, "height": 720}}


def chromium() -> str | None:
    """Return an installed browser; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def set_plain(page: Page, **settings: Any) -> None:
    """Set what `PLAIN_SETTINGS` names, to the values there where none is given."""
    settings = PLAIN_SETTINGS | settings
    page.emulate_media(color_scheme=settings["color_scheme"])
    page.set_viewport_size(settings["viewport"])


def forget(page: Page) -> None:
    """Leave the site, and keep nothing of it: no cookie, no storage, no answer, no other page."""
    context, site = page.context, page.url
    for other in context.pages:
        if other is not page:
            other.close()
    page.unroute_all()
    page.goto("about:blank")
    context.clear_cookies()
    tools = context.new_cdp_session(page)
    tools.send("Network.clearBrowserCache")
    tools.send("Storage.clearDataForOrigin", {"origin": "/".join(site.split("/")[:3]), "storageTypes": "all"})
    tools.send("Page.resetNavigationHistory")
    tools.detach()


def log_in(page: Page, name: str, token: str) -> None:
    """Log in by keyboard alone: the first field has the focus."""
    expect(page.locator('input[name="name"]')).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/review*")


#: Returns every text that WCAG AA calls too faint: "ratio of least: text". Backgrounds and opacities are laid over each
#: other as a browser does; texts that are hidden for the eye, or of a disabled control, need no contrast.
_FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const colour = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return { rgb: [r, g, b], alpha: a / 255 };
  };
  const over = (top, alpha, below) => below.map((value, part) => alpha * top[part] + (1 - alpha) * value);
  const light = (rgb) => rgb.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, part) => sum + value * [0.2126, 0.7152, 0.0722][part], 0);
  const chain = (element) => (element ? [...chain(element.parentElement), element] : []);
  const backdrop = (elements) => {
    let below = [255, 255, 255], opacity = 1;
    for (const element of elements) {
      const style = getComputedStyle(element), { rgb, alpha } = colour(style.backgroundColor);
      opacity *= Number(style.opacity);
      below = over(rgb, alpha * opacity, below);
    }
    return { below, opacity };
  };
  const found = [];
  const check = (element, text, style) => {
    const { below, opacity } = backdrop(chain(element));
    const { rgb, alpha } = colour(style.color);
    const [high, low] = [light(over(rgb, alpha * opacity, below)), light(below)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < least) found.push(`${ratio.toFixed(2)} of ${least}: ${text} (${element.className || element.tagName})`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (text && shown && !element.closest(".vh, :disabled, script, style, noscript, option, datalist")) {
      check(element, text, getComputedStyle(element));
    }
  }
  for (const field of document.querySelectorAll("input, select, textarea")) {
    if (!field.checkVisibility() || field.matches("[type=radio], [type=checkbox], [type=range]")) continue;
    check(field, field.name, getComputedStyle(field));
    if (field.placeholder) check(field, field.placeholder, getComputedStyle(field, "::placeholder"));
  }
  return [...new Set(found)];
}"""

#: Returns every text of a control or a label that is cut off: by its box, or by the edge of the screen.
_CUT = """() => [...document.querySelectorAll("label, button, a, .button, summary, dt, dd, label span, legend")]
  .filter((e) => e.textContent.trim() && e.checkVisibility({ visibilityProperty: true })
              && !e.matches(".vh, .skip-link") && !e.closest("dialog"))
  .filter((e) => {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    const scrolled = e.closest(".table-wrap");
    return (style.overflow !== "visible" && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1))
        || (!scrolled && (box.right > innerWidth + 1 || box.left < -1));
  })
  .map((e) => e.textContent.trim().replace(/\\s+/g, " "))
  .concat([...document.querySelectorAll("select")].filter((e) => {
    const style = getComputedStyle(e), pen = new OffscreenCanvas(1, 1).getContext("2d"), arrow = 20;
    pen.font = style.font;
    const room = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - arrow;
    const text = e.selectedOptions[0]?.text ?? "";
    return e.checkVisibility() && pen.measureText(text).width > room + 1;
  }).map((e) => `${e.name}: ${e.selectedOptions[0].text}`))"""


def faint_texts(page: Page) -> list[str]:
    """Return the texts of a page whose contrast is less than WCAG 2.1 AA asks for."""
    found: list[str] = page.evaluate(_FAINT)
    return found


def cut_texts(page: Page) -> list[str]:
    """Return the texts of labels and controls that nobody can read to their end."""
    found: list[str] = page.evaluate(_CUT)
    return found
