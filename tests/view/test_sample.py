"""`mm-agrae sample`: examples and graded completions on a page or a contact sheet."""

import pytest
from helpers import VL
from PIL import Image

from mm_agrae.config import parse
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.types import Example
from mm_agrae.view.sample import contact_sheet, sample_html, write_samples


def examples():
    red, blue = Image.new("RGB", (300, 200), "red"), Image.new("RGB", (10, 400), "blue")
    return [
        Example("1", "What colour?", "red", (red,)),
        Example("2", "Compare <image> and <image>. " + "word " * 2000, "x" * 9000, (red, blue)),
        Example("3", "<script>alert('∠')</script>\n\n" + "y" * 100_000, '<b>4</b> & "5"'),
    ]


def test_contact_sheet_shows_every_image():
    sheet = contact_sheet(examples(), columns=2)
    assert sheet.mode == "RGB"
    colours = [
        {colour for _, colour in half.getcolors(maxcolors=10**6)}
        for half in (sheet.crop((0, 0, 320, 240)), sheet.crop((320, 0, 640, 240)))
    ]
    assert (255, 0, 0) in colours[0]
    assert (0, 0, 255) not in colours[0]
    assert {(255, 0, 0), (0, 0, 255)} <= colours[1]
    assert sheet.width == 640
    assert sheet.height < 1200  # long captions are cut
    one = contact_sheet(examples()[:1])
    assert one.width == 320
    caption = one.crop((0, 252, 320, one.height))
    assert min(value for _, value in caption.convert("L").getcolors()) < 60


def test_page_escapes_everything_and_holds_the_images():
    page = sample_html(examples())
    assert page.count("data:image/png;base64,") == 3
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;4&lt;/b&gt; &amp; &quot;5&quot;" in page


def test_sample_names_the_row_of_a_bad_image():
    bad = Example("1", "?", "2", ("gone.png",), origin="train.jsonl, line 7")
    for show in (lambda: contact_sheet([bad]), lambda: sample_html([bad])):
        with pytest.raises(DataError, match=r"line 7: image gone\.png"):
            show()


def sample_config(**sections):
    source = {"task": "synthetic", "split": "train"}
    values = {"run_dir": "unused", "model": {"path": VL}, "train": {"steps": 1}}
    return parse({**values, "data": {"train": [source]}, **sections})


def test_write_samples_as_page_and_sheet(tmp_path):
    options = {"split": "train", "count": 3, "completions": 0}
    out = write_samples(sample_config(), out=tmp_path / "x.html", **options)
    page = out.read_text(encoding="utf-8")
    assert page.count("<article") == page.count("data:image/png;base64,") == 3
    sheet = Image.open(write_samples(sample_config(), out=tmp_path / "x.png", **options))
    assert sheet.width == 3 * 320
    assert write_samples(sample_config(), out=tmp_path / "new" / "x.PNG", **options).read_bytes()[1:4] == b"PNG"
    for name, change, words in (
        ("x.png", {"completions": 1}, "use .html"),
        ("x.html", {"split": "evaluate"}, "data.evaluate names no data"),
        ("x.png/x.html", {}, "cannot write"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_samples(sample_config(), out=tmp_path / name, **(options | change))


def test_write_samples_with_graded_completions(tmp_path):
    config = sample_config(evaluate={"max_new_tokens": 8})
    out = write_samples(config, split="train", count=2, completions=3, out=tmp_path / "x.html")
    page = out.read_text(encoding="utf-8")
    assert page.count("<article") == 2
    assert page.count('class="verdict') == page.count("<pre>") == 6
