"""The demo in a real headless Chromium. What a test asserts is what a person would see.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
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
WAIT_MS = 1000 * int(os.environ.get("MM_AGRAE_BROWSER_WAIT_S", "60"))
"""How long something may take to appear. Machines that run tests may be busy."""


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
    """The app, listening on a free port in this process; its address."""
    app = demo("app").launch(settings, block=False)
    try:
        yield app.local_url
    finally:
        app.close()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def visit(
    browser: Any, address: str, *, tab: str = "", size: dict[str, int] = DESK, dark: bool = False
) -> Any:
    """A page of a person of their own (no cookies or session shared), on the named tab.

    `page.asked` collects the hosts it made requests to, `page.errors` its JavaScript errors.
    """
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.asked, page.errors = set(), []
    page.on("request", lambda request: page.asked.add(request.url.split("/")[2]))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.open_requests = set()
    page.on("request", lambda request: page.open_requests.add(request))
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda request: page.open_requests.discard(request))
    page.goto(f"{address}?__theme={'dark' if dark else 'light'}")
    page.get_by_role("tab").first.wait_for()
    settle(page)
    if tab:
        open_tab(page, tab)
    return page


def settle(page: Any) -> None:
    """Wait as a person does until the page has come to rest.

    A page of Gradio first draws itself and then asks for what each tab shows at the start; what
    is clicked in between may be lost. Its heartbeat is a request that never ends.
    """
    quiet = 0
    for _ in range(WAIT_MS // 100):
        waiting = [r for r in page.open_requests if "/heartbeat/" not in r.url]
        quiet = 0 if waiting else quiet + 1
        if quiet == 5:
            return
        page.wait_for_timeout(100)
    raise TimeoutError(f"still asking for {[request.url for request in waiting]}")


def open_tab(page: Any, name: str) -> None:
    """By its tab, or by the menu that holds what does not fit a narrow screen."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        return
    tab.click()


def fits(page: Any) -> bool:
    """Whether nothing makes the page scroll sideways."""
    return page.evaluate(
        "() => document.scrollingElement.scrollWidth <= document.documentElement.clientWidth"
    )


def low_contrast(page: Any, inside: str, least: float = 4.5) -> list[str]:
    """Texts under the selector whose contrast with what is behind them is below `least` (WCAG).

    Colours are read off a canvas, whatever notation CSS gives them in; translucent backgrounds
    are laid over each other from the outside in.
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
