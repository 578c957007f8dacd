"""The run explorer in a real browser."""

import re

import pytest
from browser import PHONE, choose, demo, fits, low_contrast, needs_browser, served, set_number, settle, visit
from run_folders import HOSTILE, evaluate, make_run, rollouts, train

from mm_agrae.view.demo_settings import DemoSettings

pytestmark = needs_browser
GROUPS = 11  # more than one page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with everything in it, one that keeps no completions, one that has just begun."""
    root = tmp_path_factory.mktemp("explorer")
    full = make_run(root / "runs" / "full", range(2, 41, 2), groups=3)
    full.write_rollouts(
        40,
        rollouts(
            full,
            40,
            groups=GROUPS,
            completion={(1, 2): f"before {HOSTILE} after", (6, 0): "needle in a haystack"},
            finish_reason={(2, 3): "length"},
            error={(3, 1): "accuracy: timed out after 1 s", (4, 0): HOSTILE},
            question={(2, i): HOSTILE for i in range(4)},
            images={(5, i): ("../../secret.png",) for i in range(4)},
        ),
    )
    (full.path / "rollouts" / "step_000010.parquet").write_bytes(b"PAR1 nonsense PAR1")
    full.write_summary({"steps": 40})
    bare = make_run(root / "runs" / "bare", [1, 2, 3], groups=1)
    for path in (bare.path / "rollouts").iterdir():
        path.unlink()
    evaluate(make_run(root / "runs" / "begun"), "before", [1])
    evaluated = make_run(root / "runs" / "evaluated")
    evaluate(evaluated, "models/base", [1])
    evaluated.write_difficulty({HOSTILE: measured_difficulty()})
    (root / "secret.png").write_bytes(next((full.path / "images").iterdir()).read_bytes())
    make_run(root / "secret", [1])
    return root / "runs"


@pytest.fixture(scope="module")
def address(runs):
    with served(DemoSettings(models={}, runs=(runs,))) as address:
        yield address


def measured_difficulty():
    """One task of difficulty.json."""
    known = {"value": 0.5, "low": 0.25, "high": 0.75}
    base = {"name": "models/base", "read": 1.0, "spearman": known, "auroc": None}
    return {
        "rating": "spoken",
        "label": "level",
        "pool": dict.fromkeys(("failure", "saturated", "savant", "brittle"), known),
        "examinees": [base | {"accuracy": known, "ability": 0.0, "ability_error": 1.0}],
        "best_models": [0.5],
        "levels": [[1, 6, known, 42.0]],
    }


def cards(page):
    return page.locator("#explorer-cards article")


def says(page, text, where="#explorer-cards"):
    page.locator(where).get_by_text(text).first.wait_for()


def full(browser, address, **settings):
    page = visit(browser, address, tab="Runs", **settings)
    says(page, re.compile("steps"), "#explorer-about")
    if page.get_by_label("Run", exact=True).input_value() != "full":
        choose(page, "Run", "full")
    says(page, f"Step 40: {GROUPS} groups")
    return page


@pytest.fixture(scope="module")
def window(browser, address):
    return full(browser, address)


@pytest.fixture
def page(window):
    """The run "full" as it opens: choosing a run resets filters, page and step."""
    choose(window, "Run", "begun")
    says(window, "No step has been finished yet.")
    choose(window, "Run", "full")
    says(window, f"Step 40: {GROUPS} groups")
    yield window
    assert window.errors == []


def prompts(page, wanted):
    """Wait until the cards are those of these prompts, in this order."""
    page.wait_for_function(
        """wanted => JSON.stringify([...document.querySelectorAll('#explorer-cards article')].map(
            card => +card.innerText.match(/prompt (\\d+) ·/)[1])) === JSON.stringify(wanted)""",
        arg=wanted,
    )


def filter_by(page, name):
    page.locator("#explorer-filter label").filter(has_text=re.compile(rf"^\s*{name} \(")).click()


def titles(page):
    return cards(page).locator("h4").all_inner_texts()


def test_a_run_opens_with_curves_and_the_groups_of_its_last_step(browser, address):
    page = full(browser, address)
    says(page, "Finished after 40 steps.", "#explorer-about")
    curves = page.locator("#explorer-curves")
    for title in ("Reward", "Success", "ω", "Groups", "Entropy", "Length", "Correct completions"):
        assert curves.locator("figcaption b", has_text=re.compile(f"^{title}$")).is_visible()
    correct = curves.get_by_role("figure", name=re.compile("^Correct"))
    assert "120" in correct.inner_text()  # at the step that is marked
    assert curves.locator("svg .mark").count() == curves.locator("svg").count()
    assert titles(page)[:5] == [f"{count} of 4 correct" for count in range(5)]
    first = cards(page).nth(1)
    assert "Question 1?" in first.inner_text()
    assert "gold 1" in first.inner_text()
    assert first.locator("img").evaluate("image => image.naturalWidth") == 24
    assert "A +1.50 → +1.25 → +0.75" in first.inner_text()
    line = first.locator("details").nth(0)
    assert not line.locator("pre").is_visible()
    line.locator("summary").focus()
    page.keyboard.press("Enter")
    line.locator("pre").wait_for()
    assert line.locator("pre").inner_text() == "<think>so it is 40.1.0</think> \\boxed{0}"
    assert "accuracy ✓ · format ✓ · finish: stop · entropy 0.25 nats" in line.inner_text()
    assert page.errors == []
    assert page.asked == {address.split("/")[2]}  # nothing from anywhere else


def test_pages_of_groups(page):
    assert cards(page).count() == 8
    assert page.locator("#explorer-back").is_disabled()
    page.locator("#explorer-next").click()
    says(page, "showing 9 to 11 of 11")
    assert cards(page).count() == 3
    page.wait_for_function(  # the first of them can be seen
        """() => {
            const top = document.querySelector('#explorer-cards').getBoundingClientRect().top;
            return -5 < top && top < innerHeight / 2;
        }"""
    )
    assert page.locator("#explorer-next").is_disabled()
    page.locator("#explorer-back").click()
    says(page, "showing 1 to 8 of 11")


def test_filters_order_and_search(page):
    for name, shown in {"verifier failed": [3, 4], "all correct": [4, 9]}.items():
        filter_by(page, name)
        prompts(page, shown)
    page.locator("#explorer-filter label").first.click()
    choose(page, "Order", "highest |A| first")
    prompts(page, [4, 9, 3, 8, 2, 7, 1, 6])
    box = page.locator("#explorer-search textarea, #explorer-search input")
    box.fill("NEEDLE")
    box.press("Enter")
    says(page, "showing 1 to 1 of 1.")
    assert cards(page).locator("details[open] pre").all_inner_texts() == ["needle in a haystack"]
    box.fill("no such text")
    page.get_by_role("button", name="Search").click()
    says(page, "None of the 11 groups of step 40 matches.")
    assert page.locator("#explorer-next").is_disabled()


def test_search_over_all_steps(page):
    """The newest step first, with the damaged one said; a step that is chosen ends it."""
    box = page.locator("#explorer-search textarea, #explorer-search input")
    box.fill("EXAMPLE 1")  # an id, in each of 20 steps, and example 10 in the last
    page.locator("#explorer-everywhere input").check()
    box.press("Enter")
    says(page, "20 groups contain it, newest step first; all 20 steps were searched; 1 of them cannot be read.")
    assert page.locator("#explorer-cards > .prose h4, #explorer-cards .agrae > h4").all_inner_texts() == [
        f"Step {step}" for step in (40, 40, 38, 36, 34, 32, 30, 28)
    ]
    page.locator("#explorer-next").click()
    says(page, "Showing 9 to 16 of 20.")
    filter_by(page, "mixed")
    says(page, "Showing 1 to 8 of 19.")  # example 10 has no correct completion
    set_number(page, "#explorer-step", 12)
    says(page, "Step 12: 3 groups, 12 completions; showing 1 to 1 of 1.")
    assert not page.locator("#explorer-everywhere input").is_checked()


def test_a_group_is_replayed_from_its_rewards_to_the_loss(page):
    card = cards(page).nth(1)
    card.get_by_text("From reward to loss").click()
    figure = card.locator("figure")
    says = " ".join(figure.inner_text().split())
    # The mean over N = 11 × 4 completions of the means over their 9 tokens.
    assert "rule agrae, α = 1.0 · ω = 0.48, the mean reward of step 40 · p = 1/4 = 25.0 %" in says
    assert "loss grpo: weight of a token = A / (N · own length), N = 44" in says
    assert "1 ✓ +1.00 +1.50 +1.25 +0.75 +1.9e-03" in says
    assert "2 ✗ +0.00 -0.50 -0.75 -0.25 -6.3e-04" in says
    assert figure.locator(".hatch").count() == 0
    assert low_contrast(page, "#explorer-cards figure") == []


def test_sliding_to_a_step_by_keyboard(page):
    slider = page.locator("#explorer-step input[type=range]")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["2", "40", "2"]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    says(page, "Step 38: 3 groups, 12 completions")
    length = page.locator("#explorer-curves figure", has_text="Length")
    length.get_by_text("58", exact=True).wait_for()  # 20 + 38 tokens
    set_number(page, "#explorer-step", 10)
    says(page, "step_000010.parquet is damaged")
    assert cards(page).count() == 0
    set_number(page, "#explorer-step", 12)
    says(page, "Step 12: 3 groups")


def test_smoothing_redraws_the_curve(page):
    path = page.locator("#explorer-curves figure", has_text="Entropy").locator("path.line")
    before = path.get_attribute("d")
    set_number(page, "#explorer-smoothing", 10)
    page.wait_for_function(
        "before => ![...document.querySelectorAll('#explorer-curves path.line')]"
        ".some(path => path.getAttribute('d') === before)",
        arg=before,
    )
    assert page.locator("#explorer-curves path.faint").count() > 0


def test_model_text_is_text_and_an_image_outside_the_run_is_not_shown(page):
    assert "image missing" in cards(page).nth(5).inner_text()
    assert cards(page).nth(5).locator("img").count() == 0
    card = cards(page).nth(1)
    card.locator("summary").nth(2).click()
    shown = card.locator("details[open] pre")
    assert shown.inner_text() == f"before {HOSTILE} after"
    cards(page).nth(4).locator("summary").nth(0).click()
    assert HOSTILE in cards(page).nth(4).inner_text()  # the verifier's own message
    assert HOSTILE.replace("<image>", "") in cards(page).nth(2).locator(".question").inner_text()
    box = page.locator("#explorer-search textarea, #explorer-search input")
    box.fill(HOSTILE)
    box.press("Enter")
    says(page, "showing 1 to 2 of 2.")
    settle(page)
    assert page.evaluate("window.broken") is None
    assert page.locator("#explorer-cards script, #explorer-cards img[onerror]").count() == 0
    assert page.locator("h1").first.is_visible()  # no style of the model's took hold


def test_files_are_not_served(window, address, runs):
    places = [
        runs / "full" / "config.yaml",
        runs / "full" / "rollouts" / "step_000040.parquet",
        next((runs / "full" / "images").iterdir()),
        runs.parent / "secret.png",
        runs / "full" / ".." / ".." / "secret.png",
        "/etc/passwd",
        "../../../../etc/passwd",
    ]
    for place in places:
        answer = window.request.get(f"{address}gradio_api/file={place}")
        assert answer.status in (400, 403, 404), place


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("../secret", 1, "all", "as sampled", "", False), "no such run"),
        (("secret", 1, "all", "as sampled", "", False), "no such run"),
        (("/etc", 1, "all", "as sampled", "", False), "no such run"),
        ((None, 1, "all", "as sampled", "", False), "no such run"),
        (("full", -(10**30), "all", "as sampled", "", False), "Step 2:"),
        (("full", float("inf"), "all", "as sampled", "", False), "Step 40:"),
        (("full", 40, "all", "as sampled", "\ud800\0" * 9, False), "None of the 11 groups"),
        (("full", 40, "all", "as sampled", "\ud800\0" * 9, True), "0 groups contain it"),
    ],
)
def test_what_a_browser_could_send_by_hand(runs, arguments, answer):
    """The functions behind the screen, called with what no screen offers."""
    import gradio as gr

    with gr.Blocks():
        tab = demo("explorer").ExplorerTab(DemoSettings(models={}, runs=(runs,)))
    assert answer in str(tab.list_groups(*arguments, 10**9, 0)[0])
    curves = str(tab.draw_curves(*arguments[:2], 1e9)[0])
    assert ("no such run" in curves) == (answer == "no such run")


def test_a_run_cannot_be_asked_for_by_path(window, address, runs):
    """What the screen sends, sent with another name."""
    app = demo("app").build(DemoSettings(models={}, runs=(runs,)))
    numbers = {fn.fn.__name__: number for number, fn in app.fns.items() if fn.fn}
    request = window.request

    def ask(run):
        session = f"by-hand-{abs(hash(run))}"
        body = {"fn_index": numbers["list_groups"], "session_hash": session}
        body["data"] = [run, 1, "all", "as sampled", "", False, None, None]  # the states are the server's
        joined = request.post(f"{address}gradio_api/queue/join", data=body)
        assert joined.ok, joined.text()
        return request.get(f"{address}gradio_api/queue/data?session_hash={session}").text()

    assert "so it is 2.1.0" in ask("full")  # a proper name works this way
    for name in ("../secret", "secret", "/etc"):
        answer = ask(name)
        assert "so it is" not in answer
        assert '"success":false' in answer or "no such run" in answer


def test_runs_that_have_little_to_show(page):
    choose(page, "Run", "bare")
    says(page, "This run kept no completions")
    says(page, "Not finished: 3 of 40 steps so far.", "#explorer-about")
    assert page.locator("#explorer-curves svg").count() > 5
    assert page.locator("#explorer-step input[type=range]").is_disabled()
    choose(page, "Run", "begun")
    says(page, "No step has been finished yet.")
    assert page.locator("#explorer-curves svg").count() == 0
    choose(page, "Run", "evaluated")
    says(page, "see Compare for the evaluations")
    says(page, "An evaluation of checkpoints, without training.", "#explorer-about")


def test_the_success_of_each_problem_over_the_steps(browser, tmp_path):
    run = make_run(tmp_path / "runs" / "run", [1])
    run.write_rollouts(2, rollouts(run, 2, groups=1, success={(0, 0): True}))
    once = make_run(tmp_path / "runs" / "once", [3])
    with served(DemoSettings(models={}, runs=(tmp_path / "runs",))) as address:
        page = visit(browser, address, tab="Runs")
        choose(page, "Run", "run")
        says(page, "Step 2: 1 groups")
        problems, fold = page.locator("#explorer-problems"), page.locator("#explorer-difficulty > button")
        fold.click()
        says(page, "Problems drawn more than once: 1 hardest of 1", "#explorer-problems")
        assert problems.locator("tbody tr").all_inner_texts() == ["example 0\t8.00\t0/4 → 1/4\t1, 2"]
        # Another run closes it; it shows what there is when it is opened.
        choose(page, "Run", "once")
        problems.wait_for(state="hidden")
        fold.click()
        says(page, "Problems, each drawn once: 4 hardest of 4", "#explorer-problems")
        assert problems.locator("tbody th").all_inner_texts() == [f"example {i}" for i in range(4)]
        (once.path / "rollouts" / "step_000004.parquet").write_bytes(b"PAR1 nonsense PAR1")
        fold.click()
        fold.click()
        says(page, "step_000004.parquet is damaged", "#explorer-problems")
        assert page.errors == []


def test_measured_difficulty(page, runs):
    """`mm-agrae difficulty` trains nothing, so that its tables are what its folder opens with."""
    choose(page, "Run", "evaluated")
    problems = page.locator("#explorer-problems")
    problems.get_by_text("Ratings (spoken) against level").wait_for()
    assert problems.locator("h3").inner_text() == HOSTILE
    assert problems.locator("h4").count() == problems.locator("table").count() == 4
    assert "models/base\t100\t0.50 [0.25, 0.75]\t–" in problems.locator("table").first.inner_text()
    assert fits(page)
    assert low_contrast(page, "#explorer-problems") == []
    damaged = runs / "evaluated" / "difficulty.json"
    kept = damaged.read_text()
    for content, message in {'{"test": {"label": 1}}': "damaged (KeyError('pool'))", "{": "not valid JSON"}.items():
        damaged.write_text(content)
        choose(page, "Run", "begun")
        says(page, "No step has been finished yet.")
        choose(page, "Run", "evaluated")
        says(page, message, "#explorer-problems [role=alert]")
    damaged.write_text(kept)


def test_a_run_that_goes_on_is_followed(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(demo("explorer"), "SECONDS_BETWEEN_LOOKS", 0.5)
    run = make_run(tmp_path / "live")
    with served(DemoSettings(models={}, runs=(run.path,))) as address:
        page = visit(browser, address, tab="Runs")
        says(page, "No step has been finished yet.")
        assert page.locator("#explorer-follow input").is_checked()
        train(run, [1, 2])
        says(page, "Step 2: 4 groups")
        says(page, "Not finished: 2 of 40 steps so far.", "#explorer-about")
        page.locator("#explorer-curves svg").first.wait_for()
        # Looking back at a step ends the following: it stays while the slider grows.
        slider = page.locator("#explorer-step input[type=range]")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        says(page, "Step 1: 4 groups")
        assert not page.locator("#explorer-follow input").is_checked()
        train(run, [3])
        page.wait_for_function("() => document.querySelector('#explorer-step input[type=range]').max === '3'")
        assert page.locator("#explorer-cards").get_by_text("Step 1: 4 groups").is_visible()
        page.locator("#explorer-follow input").check()
        train(run, [4])
        says(page, "Step 4: 4 groups")
        run.write_summary({"steps": 4})
        says(page, "Finished after 4 steps.", "#explorer-about")


def test_nothing_to_show(browser, tmp_path):
    with served(DemoSettings(models={}, runs=(tmp_path,))) as address:
        page = visit(browser, address, tab="Runs")
        says(page, "There is no run to look at yet.", "#explorer-about")
        assert page.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_readable_on_a_phone_and_in_the_dark(browser, address, dark):
    page = full(browser, address, size=PHONE, dark=dark)
    cards(page).nth(1).locator("summary").first.click()
    assert fits(page)
    assert low_contrast(page, "#explorer-cards") == []
    assert low_contrast(page, "#explorer-curves") == []
    card = cards(page).nth(1)
    image, lines = card.locator("img").bounding_box(), card.locator("h4").bounding_box()
    assert image["y"] + image["height"] <= lines["y"]  # below each other, not beside


def test_two_people_look_at_their_own(browser, address, page):
    other = full(browser, address)
    filter_by(page, "all incorrect")
    filter_by(other, "all correct")
    says(page, "to 3 of 3.")
    says(other, "to 2 of 2.")
    assert set(titles(page)) == {"0 of 4 correct"}
    assert set(titles(other)) == {"4 of 4 correct"}
    other.context.close()
