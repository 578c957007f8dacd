"""The playground in a real browser."""

import json
import threading
import urllib.error
import urllib.request
import uuid

import checkpoints
import pytest
from browser import DESK, PHONE, WAIT_S, fits, low_contrast, needs_browser, served, set_number, visit
from helpers import TEXT, VL
from PIL import Image

from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.playground import Question, SideBySide
from mm_agrae.view.playground_checkpoints import CheckpointCache

pytestmark = needs_browser

START = SyntheticTask("test")[0]
DESCRIBED = SyntheticTask("test", modality="text")[0]
HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">${window.hacked=3}{{window.hacked=4}}'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": VL,
        "words": TEXT,
        "hostile": checkpoints.hostile(folder / "hostile", HOSTILE),
        "endless": checkpoints.endless(folder / "endless"),
        "gone": "/nowhere/at/all",
    }


@pytest.fixture(scope="module")
def address(models):
    settings = DemoSettings(models=models, device="cpu", max_upload_mb=0.1)
    with served(settings) as found:
        yield found


def choose(page, *names):
    for box in page.locator("#pg-models label").all():
        box.locator("input").set_checked(box.inner_text().strip() in names)


def type_in(page, which, text):
    page.locator(f"{which} textarea, {which} input").first.fill(text)


def ask(page):
    page.locator("#pg-go").click()


def wait_for_completions(page):
    """Until the tokens of the new completions are shown: then all are written."""
    page.locator("#pg-tokens .tokens").wait_for()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")


def test_the_first_screen_is_ready_to_be_asked(person):
    page = person()
    assert page.locator("#pg-question textarea").input_value() == START.question
    assert page.locator("#pg-answer textarea, #pg-answer input").input_value() == START.answer
    image = page.locator("#pg-image img").first
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 112
    assert page.get_by_text("Choose checkpoints and press Generate").is_visible()
    assert page.get_by_text("Once a completion is written, its tokens").is_visible()
    assert page.locator("#pg-stop").is_disabled()
    choose(page, "base", "words")  # whose note on images takes room
    page.get_by_text("The image is not used by words").wait_for()
    button = page.locator("#pg-go").bounding_box()
    assert button["y"] + button["height"] < DESK["height"]  # in sight
    assert page.locator("#pg-path").count() == 0  # no path can be typed in
    host = page.url.split("/")[2]
    assert page.asked == {host}  # no other server was asked for anything
    assert host.startswith("127.0.0.1:")


def test_completions_stream_side_by_side_with_verdicts_and_agreement(person):
    page = person()
    choose(page, "base", "words")
    page.get_by_text("The image is not used by words").wait_for()
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => {
            const cards = [...document.querySelectorAll("#pg-traces .card")];
            window.seen.push(cards.map((card) => card.innerText.length));
          }).observe(document.querySelector("#pg-traces"), {childList: true, subtree: true});
        }"""
    )
    ask(page)
    wait_for_completions(page)
    seen = [lengths for lengths in page.evaluate("window.seen") if len(lengths) == 2]
    for card in range(2):
        assert len({lengths[card] for lengths in seen}) >= 2, seen
    base, words = page.locator("#pg-traces .card").all()
    assert base.locator("h3").inner_text() == "base done"
    for card in (base, words):
        assert card.locator(".trace").count() == 4
        assert card.locator(".trace .verdict").count() == 4
        correct = card.locator(".trace .verdict.correct").count()
        assert f"{correct} of 4 correct ({25 * correct:.1f}" in card.inner_text()
        shares = card.locator(".agreement > span:nth-child(3n)").all_inner_texts()
        assert sum(int(share.split(" · ")[0]) for share in shares) == 4
        for trace in card.locator(".trace").all():
            assert trace.locator(".thought").inner_text()
            assert "think>" not in trace.inner_text()
        finals = card.locator(".final").all_inner_texts()
        assert any(final.startswith("\\boxed{") for final in finals)
    assert page.locator("#pg-traces .verdict.correct").count() > 0
    words.get_by_text("asked in words").click()
    assert words.get_by_text(DESCRIBED.question).is_visible()
    boxes = [card.bounding_box() for card in (base, words)]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert "4 of 4 written" in page.locator("#pg-status").inner_text()


def test_tokens_are_coloured_and_explained(person):
    page = person()
    set_number(page, "#pg-samples", 2)
    ask(page)
    wait_for_completions(page)
    view = page.locator("#pg-tokens")
    trace = page.locator("#pg-traces .trace").first
    spoken = "".join(view.locator(".tokens span").all_text_contents())
    assert trace.locator(".thought").inner_text() in spoken
    assert spoken.endswith("<|im_end|>")
    assert "probability" in view.locator(".tokens span").first.get_attribute("title")
    assert "nats" in view.locator(".tokens span").first.get_attribute("title")
    assert "below 10.0" in view.locator(".key").inner_text()
    rows = view.locator("tbody tr").all_inner_texts()
    shares = [float(row.split("\t")[2].split("\N{NO-BREAK SPACE}")[0]) for row in rows]
    assert shares == sorted(shares)
    page.locator("#pg-by").get_by_text("entropy").click()
    view.get_by_text("Entropy at the token:").wait_for()
    rows = view.locator("tbody tr").all_inner_texts()
    entropies = [float(row.split("\t")[3]) for row in rows]
    assert entropies == sorted(entropies, reverse=True)
    page.locator("#pg-which input").click()
    page.get_by_role("option", name="base, sample 2").click()
    second = page.locator("#pg-traces .trace").nth(1).locator(".thought").inner_text()
    page.wait_for_function(
        "text => document.querySelector('#pg-tokens .tokens').textContent.includes(text)", arg=second
    )


def test_boxed_answers_are_framed_and_still_copied_whole(person):
    page = person()
    set_number(page, "#pg-samples", 1)
    ask(page)
    wait_for_completions(page)
    framed = page.locator("#pg-traces .final .boxed")
    whole = framed.inner_text()
    assert whole.startswith("\\boxed{")
    assert whole.endswith("}")
    assert framed.evaluate("box => [...box.querySelectorAll('i')].every((part) => part.offsetWidth < 2)")
    assert framed.evaluate("box => getComputedStyle(box).borderTopStyle") == "solid"


def nothing_is_shown(page):
    page.locator("#pg-traces").get_by_text("Choose checkpoints and press Generate").wait_for()
    page.locator("#pg-tokens").get_by_text("Once a completion is written, its tokens").wait_for()
    assert page.locator("#pg-traces .trace, #pg-tokens .tokens").count() == 0
    assert page.locator("#pg-which input").input_value() == ""
    assert page.locator("#pg-status").inner_text().strip() == ""


def test_a_new_problem_or_picture_clears_the_answers(person):
    page = person()
    set_number(page, "#pg-samples", 2)
    ask(page)
    wait_for_completions(page)
    page.locator("#pg-another").click()
    nothing_is_shown(page)
    ask(page)
    wait_for_completions(page)
    remove_image(page)
    nothing_is_shown(page)
    start_a_long_run(page)  # also those that are still being written, which end then
    page.locator("#pg-another").click()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")
    nothing_is_shown(page)
    assert not [t for t in threading.enumerate() if t.name.startswith("playground")]


def start_a_long_run(page, tokens=1024):
    choose(page, "endless")
    page.get_by_text("More", exact=True).click()
    set_number(page, "#pg-length", tokens)
    set_number(page, "#pg-samples", 16)
    ask(page)
    page.locator("#pg-traces .trace.writing pre").first.wait_for()


def test_stop_stops_the_sampling(person):
    page = person()
    start_a_long_run(page)
    for _ in range(2):  # the completions grow meanwhile
        page.wait_for_function(
            "length => document.querySelector('#pg-traces').innerText.length > length",
            arg=len(page.locator("#pg-traces").inner_text()),
        )
    page.locator("#pg-stop").click()
    page.locator("#pg-traces .trace.stopped").first.wait_for()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")
    assert page.locator("#pg-traces h3").inner_text() == "endless stopped"
    assert page.locator("#pg-stop").is_disabled()
    assert not [t for t in threading.enumerate() if t.name.startswith("playground")]
    # The page can be used at once again.
    choose(page, "base")
    set_number(page, "#pg-temperature", 0)
    ask(page)
    page.wait_for_function("() => document.querySelectorAll('#pg-traces .trace').length === 1")
    wait_for_completions(page)
    assert page.locator("#pg-traces .trace.stop").count() == 1


def test_leaving_the_page_stops_the_sampling(person):
    page = person()
    start_a_long_run(page)
    working = [t for t in threading.enumerate() if t.name.startswith("playground")]
    page.goto("about:blank")
    for thread in working:
        thread.join(timeout=WAIT_S)
    assert not any(thread.is_alive() for thread in working)


def test_a_hostile_text_is_shown_as_characters(person):
    page = person()
    choose(page, "hostile")
    page.get_by_text("reads text only").wait_for()
    type_in(page, "#pg-question", f"{HOSTILE} What is 1 + 1?")
    type_in(page, "#pg-answer", HOSTILE)
    ask(page)
    wait_for_completions(page)
    for part in ("#pg-traces .trace", "#pg-tokens"):
        assert HOSTILE in page.locator(part).first.inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#pg-traces script, #pg-traces img, #pg-tokens img").count() == 0
    titles = page.locator("#pg-tokens .tokens span").evaluate_all("all => all.map((e) => e.title)")
    assert any("<script>" in title for title in titles)


def test_what_goes_wrong_is_said_in_plain_words(person, tmp_path):
    page = person()
    status = page.locator("#pg-status")
    choose(page)
    ask(page)
    status.get_by_text("Choose one to 3 checkpoints; 0 are chosen.").wait_for()
    choose(page, "base", "gone")
    type_in(page, "#pg-question", "word " * 3000)
    ask(page)
    page.locator("#pg-traces").get_by_text("there is no such folder").wait_for()
    page.locator("#pg-traces").get_by_text("Shorten the question").wait_for()
    type_in(page, "#pg-question", " ")
    ask(page)
    status.get_by_text("Type a question first").wait_for()
    type_in(page, "#pg-question", "What is it?")
    wide, wrong = tmp_path / "wide.png", tmp_path / "wrong.png"
    Image.new("1", (5000, 5000)).save(wide)
    wrong.write_text("this is not an image")
    for file, said in ((wide, "5,000×5,000 pixels is more than"), (wrong, "not an image")):
        upload(page, file)
        ask(page)
        status.get_by_text(said).wait_for()
        assert str(tmp_path) not in page.content()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")


def remove_image(page):
    if page.locator("#pg-image img").count():
        page.get_by_label("Remove Image").click()
        page.locator("#pg-image img").wait_for(state="detached")


def upload(page, file):
    remove_image(page)
    page.locator("#pg-image input[type=file]").set_input_files(str(file))
    page.wait_for_function(
        """() => document.querySelector("#pg-image img")
             || document.querySelector("[data-testid=toast-body]")"""
    )


def test_an_uploaded_image_is_what_is_asked_about(person, tmp_path):
    page = person()
    other = SyntheticTask("test", levels=[4])[0]  # its numbers stand in the image alone
    file = tmp_path / "own.png"
    other.images[0].save(file)
    upload(page, file)
    type_in(page, "#pg-question", other.question)
    type_in(page, "#pg-answer", "")
    set_number(page, "#pg-samples", 1)
    ask(page)
    wait_for_completions(page)
    assert page.locator("#pg-traces .verdict").count() == 0
    first = page.locator("#pg-traces .trace").inner_text()
    remove_image(page)
    ask(page)
    page.wait_for_function("text => document.querySelector('#pg-traces .trace')?.innerText !== text", arg=first)
    wait_for_completions(page)  # the completion without the image is another one


def test_an_upload_that_is_too_large_is_refused(person, tmp_path):
    page = person()
    large = tmp_path / "large.png"
    noise = Image.effect_noise((512, 512), 100)
    noise.save(large)
    assert large.stat().st_size > 0.1 * 2**20
    remove_image(page)
    page.locator("#pg-image input[type=file]").set_input_files(str(large))
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for()
    assert "size" in toast.inner_text().lower()
    assert page.locator("#pg-image img").count() == 0


def test_two_people_at_once_get_their_own_completions(person, models):
    example, cache = SyntheticTask("test")[0], CheckpointCache(models, device="cpu")

    def alone(name, question):
        """The beginning of each completion, as generated without a browser."""
        for (shown,) in SideBySide(cache, [name], question).stream():
            thoughts = [trace.thought[:60] for trace in shown.traces]
            if thoughts and all(len(text) == 60 for text in thoughts):
                break
        return thoughts

    def thoughts(page):
        return [text[:60] for text in page.locator("#pg-traces .thought").all_text_contents()]

    first, second = person(), person()
    start_a_long_run(first)
    choose(second, "base")
    type_in(second, "#pg-question", example.question)
    ask(second)
    second.get_by_text("Waiting for its turn").wait_for()
    first.wait_for_function(
        """() => [...document.querySelectorAll("#pg-traces .thought")]
             .filter((text) => text.innerText.length >= 60).length === 16"""
    )
    assert first.locator("#pg-traces .trace.writing").count() == 16
    first.locator("#pg-stop").click()
    for page in (first, second):
        wait_for_completions(page)
    asked = Question(START.question, described=DESCRIBED.question, samples=16, max_new_tokens=1024)
    assert thoughts(first) == alone("endless", asked)
    asked = Question(example.question, START.images[0], samples=4)
    assert thoughts(second) == alone("base", asked)


def test_another_problem_fills_everything(person):
    page = person()
    seen = set()
    for _ in range(3):
        before = page.locator("#pg-image img").first.get_attribute("src")
        page.locator("#pg-another").click()
        page.wait_for_function(
            "src => document.querySelector('#pg-image img')?.getAttribute('src') !== src", arg=before
        )
        seen.add(page.locator("#pg-question textarea").input_value())
    assert len(seen) >= 2
    choose(page, "words")
    page.get_by_text("reads text only").wait_for()
    page.locator("#pg-another").click()
    page.locator("#pg-image img").first.wait_for(state="detached")
    question = page.locator("#pg-question textarea").input_value()
    described = SyntheticTask("test", modality="text")
    assert question in {described[index].question for index in range(len(described))}


def test_it_can_be_used_by_keyboard_alone(person):
    page = person()
    page.locator("#pg-question textarea").click()
    page.keyboard.press("End")
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
              const style = getComputedStyle(document.activeElement);
              return [document.activeElement.id, style.outlineStyle, style.boxShadow];
            }"""
        )
        if focused[0] == "pg-go":
            break
    assert focused[0] == "pg-go"
    assert focused[1] != "none" or focused[2] != "none"  # the focus is visible
    page.keyboard.press("Enter")
    wait_for_completions(page)
    assert page.locator("#pg-traces .verdict").count() == 4


@pytest.mark.parametrize(("size", "dark"), [(PHONE, True), (DESK, False)], ids=["phone", "desk"])
def test_it_is_readable_on_a_phone_and_in_the_dark(person, size, dark):
    page = person(size=size, dark=dark)
    choose(page, "base", "words", "gone")
    ask(page)
    wait_for_completions(page)
    assert fits(page)
    page.locator("#pg-go").hover(position={"x": 2, "y": 2})
    page.mouse.move(0, 0)
    assert low_contrast(page, ".gradio-container") == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    numbers = [int(n) for n in background.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(numbers) < 150) is dark


# -- what the server refuses, whatever the page offers


def call(address, inputs, changes):
    """Call the function with so many inputs directly, as no page would; its last message."""
    with urllib.request.urlopen(f"{address}config") as reply:
        config = json.load(reply)
    index = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == inputs and d["queue"] is True)
    data = [["base"], None, "What?", "", 1, 0, 16, 0, None]
    for index, value in changes.items():
        data[index] = value
    body = {"data": data, "fn_index": index, "session_hash": uuid.uuid4().hex}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    source = f"{address}gradio_api/queue/data?session_hash={body['session_hash']}"
    said = []
    with urllib.request.urlopen(source, timeout=WAIT_S) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                said.append(json.loads(line.removeprefix(b"data: ")))
                if said[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return said


@pytest.mark.parametrize(
    "changes",
    [
        {0: [VL]},
        {0: ["base", "/etc"]},
        {1: {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}},
        {1: {"path": VL + "/config.json", "meta": {"_type": "gradio.FileData"}}},
        {1: {"url": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}},
    ],
    ids=["a path", "a path beside a name", "a file", "a file of the package", "a URL"],
)
def test_paths_from_the_browser_are_refused(address, changes):
    answered = call(address, 9, {})
    assert answered[-1]["success"] is True  # so the call itself is valid
    refused = call(address, 9, changes)
    assert refused[-1]["success"] is False, refused[-1]
    assert "boxed" not in json.dumps(refused)


def test_files_of_the_machine_cannot_be_read(address):
    for path in ("/etc/hostname", f"{VL}/config.json", "pyproject.toml", "../../etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert caught.value.code in (403, 404)


def test_a_model_path_can_be_added_where_that_is_allowed(browser):
    settings = DemoSettings(models={"base": VL}, allow_model_paths=True, device="cpu")
    with served(settings) as address:
        page = visit(browser, address)
        type_in(page, "#pg-path", TEXT)
        page.get_by_role("button", name="Add", exact=True).click()
        page.locator("#pg-models label").nth(1).wait_for()
        page.locator("#pg-note").get_by_text("The image is not used by").wait_for()
        ask(page)
        wait_for_completions(page)
        names = page.locator("#pg-traces h3").all_inner_texts()
        assert names == ["base done", f"{TEXT} done"]
        other = visit(browser, address)  # someone else is not shown it
        assert other.locator("#pg-models label").count() == 1
        page.context.close()
        other.context.close()


def test_without_any_checkpoint_the_screen_says_what_to_do(browser):
    with served(DemoSettings(models={})) as address:
        page = visit(browser, address)
        assert page.get_by_text("No checkpoint here. Name one: mm-agrae demo PATH").is_visible()
        assert page.errors == []
        page.context.close()
