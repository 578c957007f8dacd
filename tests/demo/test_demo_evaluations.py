"""The comparison of evaluations in a real browser."""

import pytest
from browser import PHONE, choose, demo, fits, low_contrast, needs_browser, served, settle, visit
from run_folders import HOSTILE, evaluate, make_run

from mm_agrae.view.demo_settings import DemoSettings

pytestmark = needs_browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    run = make_run(root / "runs" / "train", [1])
    evaluate(run, "before", [0, 4, 1, 3, 2, 0, 0, 0, 0, 0, 0], text=HOSTILE)
    evaluate(run, "after", [4, 0, 3, 1, 2, 0, 2, 2, 2, 2, 2])
    other = make_run(root / "runs" / "xeval")
    evaluate(other, "models/base", [1, 2], label="geometry")
    evaluate(other, "after", [1, 4, 1], samples=2)
    (other.path / "evaluations" / "models-base" / "samples.jsonl").unlink()
    return root / "runs"


@pytest.fixture(scope="module")
def address(runs):
    with served(DemoSettings(models={}, runs=(runs,))) as address:
        yield address


@pytest.fixture(scope="module")
def page(browser, address):
    page = visit(browser, address, tab="Compare")
    says(page, "11 problems are in both.", "gains")
    return page


def says(page, text, where="cards"):
    page.locator(f"#compare-{where}").get_by_text(text).first.wait_for()


def kind(page, name):
    page.locator("#compare-filter label").filter(has_text=name).click()


def questions(page):
    return page.locator("#compare-cards article .question").all_inner_texts()


def test_pass_at_k_of_several_evaluations(page):
    overview = page.locator("#compare-overview")
    assert overview.locator("h3").all_inner_texts() == ["geometry", "test"]
    names = [svg.get_attribute("aria-label") for svg in overview.locator("svg").all()]
    assert names == ["pass@k by k: xeval · models/base", "pass@k by k: train · before, train · after, xeval · after"]
    assert overview.locator("svg").nth(1).locator("path.band").count() == 3
    row = overview.get_by_role("row", name="train · after")
    assert row.get_by_role("cell").first.inner_text().startswith("45.5 (")
    # Removing one leaves the rest.
    chosen = page.locator("#compare-chosen")
    chosen.get_by_text("xeval · models/base · geometry").locator("..").get_by_role("button").click()
    page.wait_for_function("() => document.querySelectorAll('#compare-overview svg').length === 1")
    assert overview.locator("h3").all_inner_texts() == ["test"]


def test_problems_that_one_solves_and_the_other_does_not(page):
    kind(page, "Solved by the second alone (6)")
    says(page, "Problems solved by the second alone: 1 to 5 of 6.")
    assert questions(page)[0] == "Question 0?"  # the largest gain first
    card = page.locator("#compare-cards article").first
    assert [" ".join(title.split()) for title in card.locator("h4").all_inner_texts()] == [
        "before: 0 of 4 correct (0.0 %) ✗ incorrect",
        "after: 4 of 4 correct (100.0 %) ✓ correct",
    ]
    assert card.locator("pre").nth(1).inner_text() == "<think>so of after</think> 0/0"
    assert "gold 0" in card.inner_text()
    assert card.locator("img").evaluate("image => image.naturalWidth") == 24
    before, after = (card.locator("pre").nth(i).bounding_box() for i in (0, 1))
    assert before["y"] == after["y"]  # side by side
    assert before["x"] + before["width"] <= after["x"]
    page.locator("#compare-next").click()
    says(page, "6 to 6 of 6.")
    assert len(questions(page)) == 1
    assert page.locator("#compare-next").is_disabled()
    page.locator("#compare-back").click()
    says(page, "1 to 5 of 6.")
    kind(page, "Solved by the first alone (1)")
    says(page, "Problems solved by the first alone: 1 to 1 of 1.")
    assert questions(page) == ["Question 1?"]


def test_model_text_is_text(page):
    kind(page, "Solved by the first alone (1)")
    says(page, "Problems solved by the first alone: 1 to 1 of 1.")
    first = page.locator("#compare-cards article pre").first
    assert first.inner_text() == f"<think>{HOSTILE} of before</think> 1/0"
    settle(page)
    assert page.evaluate("window.broken") is None
    assert page.locator("#compare-cards script, #compare-cards img[onerror]").count() == 0
    assert page.errors == []


def test_the_gain_is_shown_with_its_interval(page):
    tiles = page.locator("#compare-gains .tile").all_inner_texts()
    assert [tile.splitlines()[0] for tile in tiles] == ["pass@1, second minus first", "pass@4, second minus first"]
    assert tiles[0].splitlines()[1] == "+22.7 points"


def test_pairs_that_cannot_be_compared(page):
    choose(page, "Second", "xeval · models/base · geometry")
    says(page, "the samples of models/base were not kept")
    choose(page, "Second", "train · before · test")
    says(page, "Choose two different evaluations of the same problems.")
    choose(page, "Second", "xeval · after · test")
    says(page, "3 problems are in both.", "gains")  # by four samples and by two
    assert page.locator("#compare-gains .tile").count() == 2
    choose(page, "Second", "train · after · test")
    says(page, "11 problems are in both.", "gains")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_readable_on_a_phone_and_in_the_dark(person, dark):
    page = person(tab="Compare", size=PHONE, dark=dark)
    says(page, "Problems solved by the second alone")
    assert fits(page)
    for part in ("overview", "gains", "cards"):
        assert low_contrast(page, f"#compare-{part}") == []


def test_nothing_to_compare(browser, tmp_path):
    run = make_run(tmp_path / "run")
    with served(DemoSettings(models={}, runs=(run.path,))) as address:
        page = visit(browser, address, tab="Compare")
        says(page, "No evaluation was found in the given runs.", "overview")
        assert page.errors == []


@pytest.mark.parametrize("names", [("../x", "/etc"), (None, None), ("", "train · after"), (["a"], {"b": 1})])
def test_names_from_outside_never_become_paths(runs, names):
    import gradio as gr

    with gr.Blocks():
        tab = demo("evaluations").EvaluationsTab(DemoSettings(models={}, runs=(runs,)))
    shown = tab.list_problems(*names, "neither", 10**9, 1)
    assert "Choose two different evaluations" in str(shown[1])
    assert "Choose at least one evaluation" in str(tab.draw_overview([*names]))
