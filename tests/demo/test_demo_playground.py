"""The playground in a real browser: what a person does, and what they then see."""

import json
import threading
import urllib.error
import urllib.request
import uuid

import checkpoints
import pytest
from browser import PHONE, chromium, fits, low_contrast, needs_browser, served, visit
from helpers import TEXT, VL
from PIL import Image

from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.view.demo_settings import DemoSettings

pytestmark = needs_browser

START = SyntheticTask("test")[4]
DESCRIBED = SyntheticTask("test", modality="text")[4]
HOSTILE = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">'
    "${window.hacked=3}{{window.hacked=4}}"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {
        "base": VL,
        "words": TEXT,
        "hostile": checkpoints.hostile(folder / "hostile", HOSTILE),
        "endless": checkpoints.endless(folder / "endless"),
        "gone": "/nowhere/at/all",
    }
    settings = DemoSettings(models=models, device="cpu", max_upload_mb=0.1)
    with served(settings) as found:
        yield found


@pytest.fixture
def person(browser, address):
    """Opens pages for one test, each for a person of their own."""
    pages = []

    def come(**options):
        pages.append(visit(browser, address, **options))
        return pages[-1]

    yield come
    for page in pages:
        assert page.errors == []
        page.context.close()


def choose(page, *names):
    for box in page.locator("#pg-models label").all():
        box.locator("input").set_checked(box.inner_text().strip() in names)


def set_slider(page, which, value):
    page.locator(f"{which} input[type=number]").fill(str(value))
    page.locator(f"{which} input[type=number]").press("Enter")


def type_in(page, which, text):
    page.locator(f"{which} textarea, {which} input").first.fill(text)


def ask(page):
    page.locator("#pg-go").click()


def wait_for_answers(page):
    """Until the tokens of the new answers are shown: then all is written."""
    page.locator("#pg-tokens .tokens").wait_for()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")


def test_the_first_screen_is_ready_to_be_asked(person):
    page = person()
    assert page.locator("#pg-question textarea").input_value() == START.question
    assert page.locator("#pg-answer textarea, #pg-answer input").input_value() == START.answer
    picture = page.locator("#pg-picture img").first
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 112
    assert page.get_by_text("Choose checkpoints and press Answer").is_visible()
    assert page.get_by_text("Once an answer is written, its tokens").is_visible()
    assert page.locator("#pg-stop").is_disabled()
    assert page.locator("#pg-path").count() == 0  # no path can be typed in
    host = page.url.split("/")[2]
    assert page.asked == {host}  # no other server was asked for anything
    assert host.startswith("127.0.0.1:")


def test_answers_stream_side_by_side_with_verdicts_and_agreement(person):
    page = person()
    choose(page, "base", "words")
    page.get_by_text("The picture is not used by words").wait_for()
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => {
            const cards = [...document.querySelectorAll("#pg-answers .card")];
            window.seen.push(cards.map((card) => card.innerText.length));
          }).observe(document.querySelector("#pg-answers"), {childList: true, subtree: true});
        }"""
    )
    ask(page)
    wait_for_answers(page)
    seen = [lengths for lengths in page.evaluate("window.seen") if len(lengths) == 2]
    for card in range(2):
        assert len({lengths[card] for lengths in seen}) >= 2, seen
    base, words = page.locator("#pg-answers .card").all()
    assert base.locator("h3").inner_text() == "base done"
    for card in (base, words):
        assert card.locator(".trace").count() == 4
        assert card.locator(".trace .verdict").count() == 4
        right = card.locator(".trace .verdict.right").count()
        assert f"{right} of 4 right ({25 * right:.1f}" in card.inner_text()
        shares = card.locator(".agreement > span:nth-child(3n)").all_inner_texts()
        assert sum(int(share.split(" · ")[0]) for share in shares) == 4
        for trace in card.locator(".trace").all():
            assert trace.locator(".thought").inner_text()
            assert "think>" not in trace.inner_text()
        finals = card.locator(".final").all_inner_texts()
        assert any(final.startswith("\\boxed{") for final in finals)
    assert page.locator("#pg-answers .verdict.right").count() > 0
    words.get_by_text("asked in words").click()
    assert words.get_by_text(DESCRIBED.question).is_visible()
    boxes = [card.bounding_box() for card in (base, words)]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert "4 of 4 written" in page.locator("#pg-status").inner_text()


def test_tokens_are_coloured_and_explained(person):
    page = person()
    set_slider(page, "#pg-samples", 2)
    ask(page)
    wait_for_answers(page)
    view = page.locator("#pg-tokens")
    trace = page.locator("#pg-answers .trace").first
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
    view.get_by_text("Entropy where it was drawn").wait_for()
    rows = view.locator("tbody tr").all_inner_texts()
    entropies = [float(row.split("\t")[3]) for row in rows]
    assert entropies == sorted(entropies, reverse=True)
    page.locator("#pg-which input").click()
    page.get_by_role("option", name="base, sample 2").click()
    second = page.locator("#pg-answers .trace").nth(1).locator(".thought").inner_text()
    page.wait_for_function(
        "text => document.querySelector('#pg-tokens .tokens').textContent.includes(text)",
        arg=second,
    )


def start_a_long_run(page, tokens=1024):
    choose(page, "endless")
    page.get_by_text("More", exact=True).click()
    set_slider(page, "#pg-length", tokens)
    set_slider(page, "#pg-samples", 16)
    ask(page)
    page.locator("#pg-answers .trace.writing pre").first.wait_for()


def test_stop_stops_the_sampling(person):
    page = person()
    start_a_long_run(page)
    for _ in range(2):  # the answers grow while one watches
        page.wait_for_function(
            "length => document.querySelector('#pg-answers').innerText.length > length",
            arg=len(page.locator("#pg-answers").inner_text()),
        )
    page.locator("#pg-stop").click()
    page.locator("#pg-answers .trace.stopped").first.wait_for()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")
    assert page.locator("#pg-answers h3").inner_text() == "endless stopped"
    assert page.locator("#pg-stop").is_disabled()
    assert not [t for t in threading.enumerate() if t.name.startswith("playground")]
    # The page can be used at once again.
    choose(page, "base")
    set_slider(page, "#pg-temperature", 0)
    ask(page)
    page.wait_for_function("() => document.querySelectorAll('#pg-answers .trace').length === 1")
    wait_for_answers(page)
    assert page.locator("#pg-answers .trace.stop").count() == 1


def test_leaving_the_page_stops_the_sampling(person):
    page = person()
    start_a_long_run(page)
    working = [t for t in threading.enumerate() if t.name.startswith("playground")]
    page.goto("about:blank")
    for thread in working:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in working)


def test_a_hostile_text_is_shown_as_characters(person):
    page = person()
    choose(page, "hostile")
    page.get_by_text("reads text alone").wait_for()
    type_in(page, "#pg-question", f"{HOSTILE} What is 1 + 1?")
    type_in(page, "#pg-answer", HOSTILE)
    ask(page)
    wait_for_answers(page)
    for place in ("#pg-answers .trace", "#pg-tokens"):
        assert HOSTILE in page.locator(place).first.inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#pg-answers script, #pg-answers img, #pg-tokens img").count() == 0
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
    page.locator("#pg-answers").get_by_text("there is no such folder").wait_for()
    page.locator("#pg-answers").get_by_text("Shorten the question").wait_for()
    type_in(page, "#pg-question", " ")
    ask(page)
    status.get_by_text("Type a question first").wait_for()
    type_in(page, "#pg-question", "What is it?")
    wide, wrong = tmp_path / "wide.png", tmp_path / "wrong.png"
    Image.new("1", (5000, 5000)).save(wide)
    wrong.write_text("this is no picture")
    for file, said in ((wide, "5,000×5,000 pixels is more than"), (wrong, "not an image")):
        upload(page, file)
        ask(page)
        status.get_by_text(said).wait_for()
        assert str(tmp_path) not in page.content()
    page.wait_for_function("() => !document.querySelector('#pg-go').disabled")


def remove_picture(page):
    if page.locator("#pg-picture img").count():
        page.get_by_label("Remove Image").click()
        page.locator("#pg-picture img").wait_for(state="detached")


def upload(page, file):
    remove_picture(page)
    page.locator("#pg-picture input[type=file]").set_input_files(str(file))
    page.wait_for_function(
        """() => document.querySelector("#pg-picture img")
             || document.querySelector("[data-testid=toast-body]")"""
    )


def test_an_own_picture_is_what_is_asked_about(person, tmp_path):
    page = person()
    other = SyntheticTask("test")[0]
    file = tmp_path / "own.png"
    other.images[0].save(file)
    upload(page, file)
    type_in(page, "#pg-question", other.question)
    type_in(page, "#pg-answer", "")
    set_slider(page, "#pg-samples", 1)
    ask(page)
    wait_for_answers(page)
    assert page.locator("#pg-answers .verdict").count() == 0
    first = page.locator("#pg-answers .trace").inner_text()
    remove_picture(page)
    ask(page)
    page.wait_for_function(
        "text => document.querySelector('#pg-answers .trace')?.innerText !== text", arg=first
    )
    wait_for_answers(page)  # the answer without the picture is another one


def test_an_upload_that_is_too_large_is_refused(person, tmp_path):
    page = person()
    large = tmp_path / "large.png"
    noise = Image.effect_noise((512, 512), 100)
    noise.save(large)
    assert large.stat().st_size > 0.1 * 2**20
    remove_picture(page)
    page.locator("#pg-picture input[type=file]").set_input_files(str(large))
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for()
    assert "size" in toast.inner_text().lower()
    assert page.locator("#pg-picture img").count() == 0


def test_two_people_at_once_get_their_own_answers(person):
    example = SyntheticTask("test")[0]

    def begin(page, name):
        if name == "endless":
            start_a_long_run(page, tokens=384)
        else:
            choose(page, name)
            type_in(page, "#pg-question", example.question)
            ask(page)

    def begins(page):
        """The first part of each answer: rounding may part two long ones much later."""
        wait_for_answers(page)
        texts = page.locator("#pg-answers .trace").all_text_contents()
        return [text.partition("Reasoning")[2][:60] for text in texts]

    alone = []
    for name in ("endless", "base"):
        page = person()
        begin(page, name)
        alone.append(begins(page))
    assert (len(alone[0]), len(alone[1])) == (16, 4)
    first, second = person(), person()
    begin(first, "endless")
    begin(second, "base")
    second.get_by_text("Waiting for its turn").wait_for()
    assert first.locator("#pg-answers .trace.writing").count() > 0
    for page, expected in ((first, alone[0]), (second, alone[1])):
        assert begins(page) == expected


def test_drawing_another_problem_fills_everything(person):
    page = person()
    seen = set()
    for _ in range(3):
        before = page.locator("#pg-picture img").first.get_attribute("src")
        page.locator("#pg-draw").click()
        page.wait_for_function(
            "src => document.querySelector('#pg-picture img')?.getAttribute('src') !== src",
            arg=before,
        )
        seen.add(page.locator("#pg-question textarea").input_value())
    assert len(seen) >= 2
    choose(page, "words")
    page.get_by_text("reads text alone").wait_for()
    page.locator("#pg-draw").click()
    page.locator("#pg-picture img").first.wait_for(state="detached")
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
    assert focused[1] != "none" or focused[2] != "none"  # one sees where one is
    page.keyboard.press("Enter")
    wait_for_answers(page)
    assert page.locator("#pg-answers .verdict").count() == 4


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_it_is_readable_on_a_phone_and_in_the_dark(person, size, dark):
    page = person(size=size, dark=dark)
    choose(page, "base", "words", "gone")
    ask(page)
    wait_for_answers(page)
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
    index = next(
        d["id"] for d in config["dependencies"] if len(d["inputs"]) == inputs and d["queue"] is True
    )
    data = [["base"], None, "What?", "", 1, 0, 16, 0, None]
    for place, value in changes.items():
        data[place] = value
    body = {"data": data, "fn_index": index, "session_hash": uuid.uuid4().hex}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    source = f"{address}gradio_api/queue/data?session_hash={body['session_hash']}"
    said = []
    with urllib.request.urlopen(source, timeout=120) as stream:
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
    assert answered[-1]["success"] is True  # the call itself is right
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
        page.locator("#pg-note").get_by_text("The picture is not used by").wait_for()
        ask(page)
        wait_for_answers(page)
        names = page.locator("#pg-answers h3").all_inner_texts()
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
