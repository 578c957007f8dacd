"""The advantage lab in a real browser: move a slider, see other numbers."""

import math
import re

import pytest
from browser import DESK, PHONE, chromium, fits, low_contrast, needs_browser, served, visit

from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.lab import Setting, curves, world

pytestmark = needs_browser

TAB = "Advantage lab"


@pytest.fixture(scope="module")
def address():
    with served(DemoSettings(models={})) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def person(browser, address):
    pages = []

    def come(**options):
        pages.append(visit(browser, address, tab=TAB, **options))
        pages[-1].locator("#lab-shown svg").first.wait_for()
        return pages[-1]

    yield come
    for page in pages:
        assert page.errors == []
        page.context.close()


def seen(page):
    """(Σ|A| and ΣA at the chosen p, the table's logit changes), read off the screen."""
    notes = page.locator("#lab-shown figcaption span").all_inner_texts()
    changes = page.locator("#lab-shown tbody td:nth-child(5)").all_inner_texts()
    return [number(note.split(": ")[-1]) for note in notes if note], [number(c) for c in changes]


def number(text):
    return float(text.replace("−", "-").replace("+", ""))


def matches(page, setting):
    """Whether the screen shows this setting's numbers."""
    weights, changes = seen(page)
    now = curves(setting)
    expected = [values["group level"][setting.right] for values in (now.weight, now.balance)]
    moved = [path.change for path in world(setting)]
    return weights == pytest.approx(expected, rel=0.01, abs=1e-6) and changes == pytest.approx(
        moved, rel=0.01, abs=1e-6
    )


def wait_until_it_matches(page, setting):
    for _ in range(200):
        if matches(page, setting):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{seen(page)} is not {setting}")


def set_slider(page, which, value):
    page.locator(f"{which} input[type=number]").fill(str(value))
    page.locator(f"{which} input[type=number]").press("Enter")


def choose_rule(page, name):
    page.locator("#lab-rule input").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_every_slider_and_the_rule_change_the_numbers(person):
    page = person()
    setting = Setting("agrae", 8, 2, 0.3, 1.0)
    wait_until_it_matches(page, setting)
    assert page.locator("#lab-shown svg").count() == 4
    set_slider(page, "#lab-right", 6)
    wait_until_it_matches(page, Setting("agrae", 8, 6, 0.3, 1.0))
    set_slider(page, "#lab-omega", 0.6)
    wait_until_it_matches(page, Setting("agrae", 8, 6, 0.6, 1.0))
    set_slider(page, "#lab-alpha", 0.5)  # ω is above α now: nothing is held back any more
    wait_until_it_matches(page, Setting("agrae", 8, 6, 0.6, 0.5))
    assert seen(page)[0][1] == 0
    set_slider(page, "#lab-size", 16)
    wait_until_it_matches(page, Setting("agrae", 16, 6, 0.6, 0.5))
    choose_rule(page, "grpo")
    wait_until_it_matches(page, Setting("grpo", 16, 6, 0.6))
    weight, balance = seen(page)[0]
    assert weight == pytest.approx(2 * 16 * math.sqrt(6 / 16 * 10 / 16), rel=0.01)
    assert balance == 0
    page.get_by_text("This rule has no α").wait_for()
    page.locator("#lab-alpha input[type=number]:disabled").wait_for()


def test_fewer_completions_take_the_right_ones_along(person):
    page = person()
    set_slider(page, "#lab-right", 7)
    wait_until_it_matches(page, Setting("agrae", 8, 7, 0.3))
    set_slider(page, "#lab-size", 4)
    wait_until_it_matches(page, Setting("agrae", 4, 4, 0.3))
    page.wait_for_function(
        "() => document.querySelector('#lab-right input[type=number]').value === '4'"
    )
    page.get_by_text("All completions are equal here").wait_for()


def test_the_words_follow(person):
    page = person()
    page.get_by_text("the policy explores").wait_for()
    choose_rule(page, "psr")
    page.get_by_text("the policy narrows").wait_for()
    choose_rule(page, "grpo")
    page.get_by_text("does not move (Theorem 1)").wait_for()


def test_the_curves_can_be_read_point_by_point(person):
    page = person()
    titles = page.locator("#lab-shown circle title").all_text_contents()
    heaviest = [title for title in titles if re.fullmatch(r"grpo, p 0\.5: 8", title)]
    assert len(heaviest) == 1
    labels = page.locator("#lab-shown svg").evaluate_all(
        "all => all.map((svg) => svg.getAttribute('aria-label'))"
    )
    assert all("by p:" in label for label in labels)


def test_the_arrow_keys_move_a_slider(person):
    page = person()
    page.locator("#lab-right input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_until_it_matches(page, Setting("agrae", 8, 3, 0.3))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_until_it_matches(page, Setting("agrae", 8, 1, 0.3))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_is_readable_on_a_phone_and_in_the_dark(person, size, dark):
    page = person(size=size, dark=dark)
    assert fits(page)
    assert low_contrast(page, ".gradio-container") == []
