"""Screenshots of the demo and the report for the documentation, desktop, phone and dark: docs/screens/*.png.

    python scripts/screenshots.py [--run RUN] [--out docs/screens]

Needs gradio, playwright and Chromium. Shows the run in data/example_run unless another is named;
without either, a few steps of the quickstart are run first. The images may take 1.5 MB together.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import DESK, PHONE, chromium, open_tab, served, settle, visit  # noqa: E402

from mm_agrae.view.demo_settings import embedded_runs, settings_for  # noqa: E402
from mm_agrae.view.report import write_report  # noqa: E402

LIMIT_BYTES = 1_500_000
COLOURS = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="a run folder to show")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = [arguments.run] if arguments.run else []
        if not runs and not embedded_runs():
            runs = [make_run(Path(folder) / "quickstart")]
        settings = settings_for(runs, device="cpu")
        report = write_report(shutil.copytree(settings.runs[0], Path(folder) / settings.runs[0].name))
        with served(settings) as address, chromium() as browser:
            taken = itertools.chain(shots(browser, address), report_shots(browser, report.as_uri()))
            sizes = [save(arguments.out / f"{name}.png", png) for name, png in taken]
    print(f"{len(sizes)} images, {sum(sizes) / 1e6:.2f} MB, in {arguments.out}")
    if sum(sizes) > LIMIT_BYTES:
        print(f"error: more than {LIMIT_BYTES:,} bytes", file=sys.stderr)
        return 1
    return 0


def make_run(folder: Path) -> str:
    """The first steps of the quickstart, with small evaluations."""
    from mm_agrae import config as configs
    from mm_agrae.trainer import Trainer

    changes = ["train.steps=12", "evaluate.samples=8", f"run_dir={folder}"]
    changes += [f"model.path={ROOT / 'data' / 'warm_start' / 'vl'}"]
    Trainer(configs.load(str(ROOT / "configs" / "quickstart.yaml"), changes)).train()
    return str(folder)


def shots(browser: Any, address: str) -> Any:
    """(name, PNG) of each screen."""
    page = visit(browser, address)
    generate(page, ["base", "GRPO", "A-GRAE"])
    yield "playground", page.screenshot(full_page=True)
    for tab, name in (("Runs", "runs"), ("Compare", "compare"), ("Advantage lab", "lab")):
        open_tab(page, tab)
        settle(page)
        yield name, page.screenshot(full_page=name == "lab")
        if name == "runs":
            page.locator("#explorer-cards").evaluate("cards => cards.scrollIntoView()")
            settle(page)
            yield "runs-groups", page.screenshot()
            replay(page)
            yield "runs-replay", page.screenshot()
    page.context.close()
    page = visit(browser, address, dark=True)
    generate(page, ["base", "A-GRAE"])
    page.locator("#pg-by").get_by_text("entropy").click()
    settle(page)
    page.locator("#pg-tokens").scroll_into_view_if_needed()
    yield "playground-dark", page.screenshot()
    open_tab(page, "Runs")
    settle(page)
    replay(page)
    yield "runs-replay-dark", page.screenshot()
    page.context.close()
    page = visit(browser, address, size=PHONE)
    generate(page, ["base"])
    page.locator("#pg-status").scroll_into_view_if_needed()
    yield "playground-phone", page.screenshot()
    open_tab(page, "Runs")
    settle(page)
    yield "runs-phone", page.screenshot()
    replay(page)
    yield "runs-replay-phone", page.screenshot()
    page.context.close()


def replay(page: Any) -> None:
    """Unfold how the rewards of the first group became loss weights."""
    card = page.locator("#explorer-cards article").first
    card.locator("summary").last.click()
    card.locator("figure").evaluate("figure => figure.scrollIntoView({block: 'center'})")


def report_shots(browser: Any, address: str) -> Any:
    """(name, PNG) of the report: at a desk, on a phone, and as it is printed."""
    for name, size, options in (
        ("report", DESK, {}),
        ("report-phone", PHONE, {"color_scheme": "dark"}),
        ("report-print", {"width": 700, "height": 990}, {"media": "print"}),
    ):
        page = browser.new_page(viewport=size)
        page.emulate_media(**options)
        page.goto(address)
        yield name, page.screenshot()
        page.close()


def generate(page: Any, names: list[str]) -> None:
    """Ask those of the named checkpoints that exist about the first problem."""
    for box in page.locator("#pg-models label").all():
        box.locator("input").set_checked(box.inner_text().strip() in names)
    page.locator("#pg-go").click()
    page.locator("#pg-tokens .tokens").wait_for()
    settle(page)


def save(path: Path, png: bytes) -> int:
    """Write with a small palette, at most twice as high as the screen; returns the size."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.crop((0, 0, image.width, min(image.height, 2 * DESK["height"])))
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name:24} {path.stat().st_size / 1000:6.0f} kB")
    return path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
