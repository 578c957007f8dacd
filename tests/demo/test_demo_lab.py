"""The advantage lab in a real browser: move a slider, see other numbers."""

import math
import re

import pytest
from browser import DESK, PHONE, choose, fits, low_contrast, needs_browser, served, set_number, wait_until

from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.lab import Setting, curves, world

pytestmark = needs_browser


@pytest.fixture(scope="module")
def address():
    with served(DemoSettings(models={})) as found:
        yield found


@pytest.fixture
def lab(person):
    def come(**options):
        page = person(tab="Advantage lab", **options)
        page.locator("#lab-figures svg").first.wait_for()
        return page

    return come


def seen(page):
    """(Σ|A| and ΣA at the chosen p, the table's logit changes), read off the screen."""
    notes = page.locator("#lab-figures figcaption span").all_inner_texts()
    changes = page.locator("#lab-figures tbody td:nth-child(5)").all_inner_texts()
    return [number(note.split(": ")[-1]) for note in notes if note], [number(c) for c in changes]


def number(text):
    return float(text.replace("−", "-").replace("+", ""))


def wait_for_numbers_of(page, setting):
    """Until the screen shows this setting's numbers."""
    sums = [values["group level"][setting.correct] for values in curves(setting)]
    changes = [outcome.change for outcome in world(setting)]
    expected = tuple(pytest.approx(values, rel=0.01, abs=1e-6) for values in (sums, changes))
    wait_until(page, lambda: seen(page) == expected, f"this is not {setting}")


def test_every_slider_and_the_rule_change_the_numbers_and_the_words(lab):
    page = lab()
    wait_for_numbers_of(page, Setting("agrae", 8, 2, 0.3, 1.0))
    page.get_by_text("the policy explores").wait_for()
    assert page.locator("#lab-figures svg").count() == 4
    set_number(page, "#lab-correct", 6)
    wait_for_numbers_of(page, Setting("agrae", 8, 6, 0.3, 1.0))
    set_number(page, "#lab-omega", 0.6)
    wait_for_numbers_of(page, Setting("agrae", 8, 6, 0.6, 1.0))
    set_number(page, "#lab-alpha", 0.5)  # ω is above α now: nothing is held back any more
    wait_for_numbers_of(page, Setting("agrae", 8, 6, 0.6, 0.5))
    assert seen(page)[0][1] == 0
    set_number(page, "#lab-size", 16)
    wait_for_numbers_of(page, Setting("agrae", 16, 6, 0.6, 0.5))
    choose(page, "Rule", "grpo")
    wait_for_numbers_of(page, Setting("grpo", 16, 6, 0.6))
    weight, balance = seen(page)[0]
    assert weight == pytest.approx(2 * 16 * math.sqrt(6 / 16 * 10 / 16), rel=0.01)
    assert balance == 0
    page.get_by_text("does not move (Theorem 1)").wait_for()
    page.get_by_text("This rule has no α").wait_for()
    page.locator("#lab-alpha input[type=number]:disabled").wait_for()
    choose(page, "Rule", "psr")
    page.get_by_text("the policy narrows").wait_for()


def test_fewer_completions_leave_fewer_correct_ones(lab):
    page = lab()
    set_number(page, "#lab-correct", 7)
    wait_for_numbers_of(page, Setting("agrae", 8, 7, 0.3))
    set_number(page, "#lab-size", 4)
    wait_for_numbers_of(page, Setting("agrae", 4, 4, 0.3))
    page.wait_for_function("() => document.querySelector('#lab-correct input[type=number]').value === '4'")
    page.get_by_text("All completions are equal here").wait_for()


def test_it_can_be_read_point_by_point_and_used_by_keyboard(lab):
    page = lab()
    titles = page.locator("#lab-figures circle title").all_text_contents()
    assert len([title for title in titles if re.fullmatch(r"grpo, p 0\.5: 8", title)]) == 1
    labels = page.locator("#lab-figures svg").evaluate_all("all => all.map((svg) => svg.getAttribute('aria-label'))")
    assert all("by p:" in label for label in labels)
    page.locator("#lab-correct input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_for_numbers_of(page, Setting("agrae", 8, 3, 0.3))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    wait_for_numbers_of(page, Setting("agrae", 8, 1, 0.3))


@pytest.mark.parametrize(("size", "dark"), [(PHONE, True), (DESK, False)], ids=["phone", "desk"])
def test_it_is_readable_on_a_phone_and_in_the_dark(lab, size, dark):
    page = lab(size=size, dark=dark)
    assert fits(page)
    assert low_contrast(page, ".gradio-container") == []
