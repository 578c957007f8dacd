"""The demo in a real headless Chromium, so tests assert what a person would see.

    with served(DemoSettings(...)) as address, chromium() as browser:
        page = visit(browser, address)

Playwright drives the machine's own Chromium (`apt-get install chromium`); it downloads none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [
    name
    for name, there in {
        "gradio (pip install mm-agrae[demo])": importlib.util.find_spec("gradio"),
        "playwright (pip install playwright)": importlib.util.find_spec("playwright"),
        "chromium (apt-get install chromium)": CHROMIUM,
    }.items()
    if not there
]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
TABS_THAT_LOAD = ("Runs", "Compare")
WAIT_S = int(os.environ.get("MM_AGRAE_BROWSER_WAIT_S", "240"))
"""How long something may take to appear. Test machines may be busy."""


def demo(module: str) -> Any:
    """A module of the demo, installed (`mm_agrae_demo`) or from the source tree (`demo`)."""
    if importlib.util.find_spec("mm_agrae_demo"):
        return importlib.import_module(f"mm_agrae_demo.{module}")
    root = str(Path(__file__).parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"demo.{module}")


@contextlib.contextmanager
def served(settings: Any) -> Iterator[str]:
    """The app on a free port of this process; yields its address."""
    app = demo("app").launch(settings, block=False)
    try:
        yield app.local_url
    finally:
        app.close()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1000 * WAIT_S)
        try:
            yield browser
        finally:
            browser.close()


def visit(browser: Any, address: str, *, tab: str = "", size: dict[str, int] = DESK, dark: bool = False) -> Any:
    """A page in its own session, on the named tab.

    `page.asked` collects the hosts it made requests to, `page.errors` its JavaScript errors.
    """
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_S)
    page.asked, page.errors = set(), []
    page.on("request", lambda request: page.asked.add(request.url.split("/")[2]))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.open_requests, loads = set(), []
    page.on("request", lambda request: page.open_requests.add(request))
    page.on("request", lambda request: "/queue/join" in request.url and loads.append(request))
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda request: page.open_requests.discard(request))
    page.goto(f"{address}?__theme={'dark' if dark else 'light'}")
    page.get_by_role("tab").first.wait_for()
    # Gradio first draws the page and then loads the contents of these tabs; earlier clicks are
    # lost.
    wait_until(page, lambda: len(loads) >= len(TABS_THAT_LOAD), "the tabs did not load")
    settle(page)
    if tab:
        open_tab(page, tab)
    return page


def settle(page: Any) -> None:
    """Wait until no request has been open for half a second, save Gradio's endless heartbeat."""
    quiet = 0

    def rested() -> bool:
        nonlocal quiet
        quiet = 0 if any("/heartbeat/" not in r.url for r in page.open_requests) else quiet + 1
        return quiet == 5

    wait_until(page, rested, "requests are still open")


def wait_until(page: Any, condition: Callable[[], bool], otherwise: str) -> None:
    """Check every tenth of a second, for at most WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(otherwise)
        page.wait_for_timeout(100)


def open_tab(page: Any, name: str) -> None:
    """By its tab, or by the menu for tabs that do not fit a narrow screen."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        return
    tab.click()


def choose(page: Any, label: str, option: str) -> None:
    """Choose from a dropdown."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def set_number(page: Any, slider: str, value: float) -> None:
    """Type the value of a slider."""
    box = page.locator(f"{slider} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def fits(page: Any) -> bool:
    """Whether nothing makes the page scroll sideways."""
    return page.evaluate("() => document.scrollingElement.scrollWidth <= document.documentElement.clientWidth")


def low_contrast(page: Any, inside: str, least: float = 4.5) -> list[str]:
    """Texts under the selector whose contrast with their background is below `least` (WCAG).

    Colours are read from a canvas, so any CSS notation works; translucent backgrounds are
    composited from the outside in.
    """
    return page.evaluate(_CONTRAST, [inside, least])


_CONTRAST = """
([inside, least]) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(e);
    return chain.reduce((colour, e) => {
      const own = rgba(getComputedStyle(e).backgroundColor);
      return over(own, colour);
    }, [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll(`${inside}, ${inside} *`)) {
    const text = [...element.childNodes]
      .filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || element.closest("svg, button[disabled], :disabled")) continue;
    if (!element.checkVisibility({visibilityProperty: true})) continue;
    const back = behind(element);
    const style = getComputedStyle(element);
    const front = over(rgba(style.color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) {
      const where = `${style.color} on ${back.map(Math.round)}`;
      found.push(`${ratio.toFixed(2)} ${where}: ${text.slice(0, 40)}`);
    }
  }
  return found;
}
"""
