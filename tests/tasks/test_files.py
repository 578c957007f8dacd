"""Rows of a table -> examples: fields, images, choices, filters; bad rows are named."""

import json
import string
from pathlib import Path

import pytest
from data_files import GOOD, png, write
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import DataError, UserError
from mm_agrae.tasks.files import FileTask
from mm_agrae.tasks.images import open_image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "lime", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def one(folder, row, **options):
    """The example of a file that holds this one row."""
    (example,) = FileTask(write(folder / "one.jsonl", [row]), **options)
    return example


def refused(folder, row, *words, **options):
    """The row stands on line 2, between good ones; `error` names it and `skip` leaves it out."""
    path = write(folder / "data.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as caught:
        FileTask(path, **options)
    message = str(caught.value)
    for word in (f"{path}, line 2: ", *words, "data.on_bad_row=skip"):
        assert word in message
    message.encode()
    assert len(message) < 2000
    task = FileTask(path, on_bad_row="skip", **options)
    assert [example.origin for example in task] == [f"{path}, line 1", f"{path}, line 3"]
    assert len(task.skipped) == 1
    assert task.skipped[0] in message


# Rows


def test_fields_of_an_example(folder):
    row = {"id": 17, "problem": "How long is x?", "answer": " 4 ", "images": ["images/red.png"], "level": 3}
    example = one(folder, row, meta=("level", "source"), grading={"kind": "math"})
    assert example.id == "17"
    assert example.question == "How long is x?"
    assert example.answer == "4"
    assert example.images == (str(folder / "images" / "red.png"),)
    assert example.grading == {"kind": "math"}
    assert example.origin == f"{folder / 'one.jsonl'}, line 1"
    assert example.meta == {"level": 3, "source": None}


def test_rows_without_an_id_are_named_by_file_and_line(folder):
    task = FileTask(write(folder / "train.jsonl", [GOOD, b"", GOOD]))
    assert [example.id for example in task] == ["train-1", "train-3"]


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        *((3, "3"), (27.0, "27"), (0.5, "0.5"), (-2, "-2"), ("007", "007")),
        *((["7"], "7"), (["1", "x"], "1, x"), ([20, 10, 80.5, 60], "[20, 10, 80.5, 60]")),
    ],
)
def test_answers_become_text(folder, answer, want):
    assert one(folder, {"question": "?", "answer": answer}).answer == want


def test_answer_after_a_mark(folder):
    row = {"question": "?", "answer": "4 #### 5\nso\n#### 72"}
    assert one(folder, row, answer_after="####").answer == "72"
    with pytest.raises(DataError, match="line 1: answer: no '####'"):
        one(folder, GOOD, answer_after="####")


def test_names_are_found_in_any_case(folder):
    example = one(folder, {"Problem": "?", "ANSWER": "1", "Image": "images/red.png"})
    assert (example.question, example.answer, len(example.images)) == ("?", "1", 1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{not json", ("not JSON",)),
        (b'{"problem": "?", "answer": "1"', ("not JSON",)),
        (b'{"problem": "?", "answer": "\xff"}', ("not JSON", "utf-8")),
        (b"[" * 100_000, ("not JSON",)),
        (b'{"problem": "?", "answer": ' + b"1" * 5000 + b"}", ("not JSON",)),
        (b'{"problem": "\\ud800?", "answer": "1"}', ("Unicode",)),
        (b'{"problem": "?", "answer": "1", "\\udfff": 1}', ("Unicode",)),
        ([1, 2], ("expected a JSON object", "list")),
        ("text", ("expected a JSON object", "str")),
        (None, ("expected a JSON object",)),
        ({"answer": "1"}, ("no question", "problem, question, prompt", "columns.question")),
        ({"problem": "?", "anwser": "1"}, ("no answer", "columns problem, anwser")),
        ({"problem": "?", "answer": ""}, ("answer: empty",)),
        ({"problem": "?", "answer": " \n"}, ("answer: empty",)),
        ({"problem": "?", "answer": None}, ("answer: expected text or a number", "None")),
        ({"problem": "?", "answer": True}, ("answer: expected text or a number", "bool")),
        ({"problem": "?", "answer": []}, ("answer: expected text or a number", "list")),
        ({"problem": "?", "answer": [["1"], {}]}, ("answer: expected text or a number", "list")),
        (b'{"problem": "?", "answer": NaN}', ("answer: expected text or a number",)),
        (b'{"problem": "?", "answer": 1e999}', ("answer: expected text or a number",)),
        ({"problem": "", "answer": "1"}, ("question: empty",)),
        ({"problem": 5, "answer": "1"}, ("question: expected text",)),
        ({"problem": [{"role": "user"}], "answer": "1"}, ("messages: expected text",)),
        ({"problem": [{"x": "user"}], "answer": "1"}, ("question: expected text",)),
        (GOOD | {"images": "images/gone.png"}, ("images/gone.png", "no such file")),
        (GOOD | {"images": "images"}, ("is not a file",)),
        (GOOD | {"images": ["images/red.png", None, 3]}, ("image: expected a path or bytes",)),
        (GOOD | {"images": "../outside.png"}, ("outside.png", "lies outside")),
        (GOOD | {"images": "/etc/passwd"}, ("/etc/passwd", "lies outside")),
        (GOOD | {"images": "link.png"}, ("link.png", "lies outside")),
        (GOOD | {"images": "https://example.org/x.png"}, ("https://example.org/x.png: URLs are not fetched", "curl")),
        (GOOD | {"images": "a\0b"}, ("not a usable path",)),
        (GOOD | {"images": "x" * 9000}, ("image x",)),
        (GOOD | {"problem": "<image> ?"}, ("1 <image> markers for 0 images",)),
        (GOOD | {"problem": "<image1> ?"}, ("0 images",)),
        (GOOD | {"problem": "<image><image>", "images": "images/red.png"}, ("2 <image> markers for 1 images",)),
        (GOOD | {"choices": "abc"}, ("choices: expected a list",)),
        (GOOD | {"choices": [["1"], ["2"]]}, ("choices: expected a list",)),
        (GOOD | {"choices": ["2"]}, ("choices: 1 of them",)),
        (GOOD | {"choices": ["1", "3"]}, ("neither a letter up to B nor the text",)),
        (GOOD | {"choices": ["2", "2"]}, ("neither a letter up to B nor the text",)),
        (GOOD | {"choices": ["1", "3"], "answer": "C"}, ("neither a letter up to B",)),
    ],
)
def test_bad_row_is_named_or_left_out(folder, row, words):
    (folder.parent / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    refused(folder, row, *words)


def test_damaged_image_is_named_when_it_is_decoded(folder):
    (folder / "images" / "cut.png").write_bytes(png(size=(300, 300))[:200])
    example = one(folder, GOOD | {"images": ["images/cut.png"]})
    with pytest.raises(DataError) as caught:
        open_image(example.images[0], origin=example.origin)
    assert f"{folder / 'one.jsonl'}, line 1: image " in str(caught.value)
    assert "cut.png" in str(caught.value)


def test_image_root_is_another_folder_and_still_a_limit(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    row = GOOD | {"image": "red.png"}
    example = one(elsewhere, row, image_root=str(folder / "images"))
    assert example.images == (str(folder / "images" / "red.png"),)
    with pytest.raises(DataError, match="lies outside"):
        one(elsewhere, GOOD | {"image": "../images/red.png/../../x"}, image_root=str(folder))


def test_all_rows_bad_is_an_error_even_when_skipping(folder):
    path = write(folder / "data.jsonl", [b"x", b"y"])
    with pytest.raises(DataError, match=r"no usable row; all 2 are bad, the first: .*line 1: not JSON"):
        FileTask(path, on_bad_row="skip")


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.binary() | st.text().map(str.encode), max_size=5).map(b"\n".join))
def test_arbitrary_bytes_raise_nothing_but_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        FileTask(str(path), on_bad_row="skip")


NAMES = ["role", "content", "from", "value", "type", "text", "label", "image", "bytes", "ground_truth", "A", "B"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable + "é∠\ud800"),
    lambda values: (
        st.lists(values, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(NAMES), values, max_size=3)
        | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": values}), min_size=1, max_size=2)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["problem", "answer", "images", "choices", "id", "prompt", "reward_model", "videos", "A", "B"]
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(FIELDS, VALUES, max_size=5))
def test_arbitrary_objects_are_examples_or_named(tmp_path_factory, row):
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row))
    task = FileTask(str(path), on_bad_row="skip")
    assert len(task) + len(task.skipped) == 2
    for example in task:
        assert example.answer.strip()
        json.dumps([example.question, example.answer, example.id], ensure_ascii=False).encode()
    for reason in task.skipped:
        assert "line 2" in reason


# Images in the text


RED_LIME = ["images/red.png", "images/lime.png"]


@pytest.mark.parametrize(
    ("question", "images", "want_text", "want_images"),
    [
        ("no marker", RED_LIME, "no marker", RED_LIME),
        ("<image> or <image>?", RED_LIME, "<image> or <image>?", RED_LIME),
        ("<image1> or <image2>?", RED_LIME, "<image> or <image>?", RED_LIME),
        ("<image 2> or <image 1>?", RED_LIME, "<image> or <image>?", RED_LIME[::-1]),
        ("<image2>, <image1>, <image2>?", RED_LIME, "<image>, <image>, (image 2)?", RED_LIME[::-1]),
        ("<image1> and again <image1>", RED_LIME[:1], "<image> and again (image 1)", RED_LIME[:1]),
        ("like\n<image1>\nor\n<image2>", RED_LIME[:1], "like\n<image>\nor\n(image 2)", RED_LIME[:1]),
        ("", RED_LIME[:1], "", RED_LIME[:1]),
    ],
)
def test_markers_stand_for_images_in_order(folder, question, images, want_text, want_images):
    example = one(folder, {"problem": question, "answer": "1", "images": images})
    assert example.question == want_text
    assert example.images == tuple(str(folder / name) for name in want_images)


@pytest.mark.parametrize("question", ["<image1>", "<image1><image3>", "<image0><image1>", "<image>"])
def test_markers_that_do_not_fit_the_images(folder, question):
    refused(folder, {"problem": question, "answer": "1", "images": RED_LIME}, "2 images")


def test_text_and_several_images_in_one_source(folder):
    rows = [
        {"problem": "1 + 1?", "answer": "2"},
        {"problem": "Which is red, <image> or <image>?", "answer": "first", "images": RED_LIME},
        {"problem": "2 + 2?", "answer": "4", "images": []},
        {"problem": "Which?", "answer": "third", "images": [*RED_LIME, "images/blue.png"]},
        {"problem": "3 + 3?", "answer": "6", "images": None},
    ]
    mixed = DataSource(task="files", path=write(folder / "mixed.jsonl", rows))
    text = DataSource(task="files", path=write(folder / "text.jsonl", [GOOD, GOOD]), limit=1)
    task = tasks.load_all([text, mixed, text])
    assert [len(example.images) for example in task] == [0, 0, 2, 0, 3, 0, 0]
    assert [open_image(image).getpixel((0, 0)) for image in task[4].images] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    import pyarrow
    import pyarrow.parquet

    bytes_of = {name: (folder / name).read_bytes() for name in [*RED_LIME, "images/blue.png"]}
    stored = [
        row | {"images": [{"bytes": bytes_of[name], "path": name} for name in row.get("images") or []]} for row in rows
    ]
    path = folder / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), path)
    embedded = FileTask(str(path))
    assert [len(example.images) for example in embedded] == [0, 2, 0, 3, 0]
    assert [example.question for example in embedded] == [row["problem"] for row in rows]


# Choices


def choice_row(answer, choices=("12", "15", "9"), question="How long is x?"):
    return {"problem": question, "answer": answer, "choices": choices}


def test_choices_are_shown_and_graded(folder):
    example = one(folder, choice_row("B"))
    assert example.question == "How long is x?\n(A) 12\n(B) 15\n(C) 9"
    assert example.answer == "B"
    assert dict(example.grading) == {"kind": "choice", "choices": ["12", "15", "9"]}
    hidden = one(folder, choice_row("B"), show_choices=False)
    assert hidden.question == "How long is x?"
    assert hidden.grading == example.grading


@pytest.mark.parametrize(
    ("answer", "want"), [("B", "B"), ("(B)", "B"), ("B.", "B"), ("15", "B"), ("A\nC", "A, C"), ("A and C", "A, C")]
)
def test_gold_choice_becomes_a_letter(folder, answer, want):
    assert one(folder, choice_row(answer)).answer == want


def test_letters_of_the_choices_are_not_doubled(folder):
    labelled = one(folder, choice_row("A", ["A. 12", "B: 15"]))
    assert labelled.question.endswith("?\n(A) 12\n(B) 15")
    assert labelled.grading["choices"] == ["12", "15"]
    bare = one(folder, choice_row("B", ["(A)", "(B)"]))
    assert bare.question.endswith("?\n(A)\n(B)")
    assert bare.grading["choices"] == ["A", "B"]
    text = "Which?\nChoices:\nA. 12\nB. 15"
    assert one(folder, choice_row("A", ["12", "15"], text)).question == text


def test_image_markers_among_the_choices(folder):
    row = choice_row("A", ["<image1>", "<image2>"]) | {"images": RED_LIME}
    assert one(folder, row).question == "How long is x?\n(A) <image>\n(B) <image>"
    row["images"] = RED_LIME[:1]  # one drawing that shows all choices
    assert one(folder, row).question == "How long is x?\n(A) (image 1)\n(B) (image 2)"


# Columns, filters, limits


def test_columns_by_name_and_off(folder):
    row = choice_row("B") | {"value": "15", "query": "Find x.", "pic": "images/red.png"}
    columns = {"question": "query", "answer": "value", "choices": None, "images": "pic"}
    example = one(folder, row, columns=columns)
    assert (example.question, example.answer, example.grading) == ("Find x.", "15", {})
    assert len(example.images) == 1


def test_images_and_choices_in_columns_of_their_own(folder):
    row = GOOD | {"a": "1", "b": "2", "p1": "images/red.png", "p2": None, "p3": "images/blue.png"}
    example = one(folder, row, columns={"choices": ["a", "b"], "images": ["p1", "p2", "p3"]})
    assert example.answer == "B"
    assert [Path(name).name for name in example.images] == ["red.png", "blue.png"]


def test_choice_columns_may_be_fewer_at_the_end_but_have_no_gap(folder):
    columns = {"choices": ["a", "b", "c"]}
    row = {"problem": "?", "answer": "B", "a": "1", "b": "2", "c": None}
    assert one(folder, row, columns=columns).grading["choices"] == ["1", "2"]
    with pytest.raises(DataError, match="line 1: choices: expected a list of texts"):
        one(folder, row | {"b": None, "c": "3"}, columns=columns)


def test_text_and_image_rows_may_be_mixed(folder):
    rows = [GOOD, GOOD | {"pic": "images/red.png"}, GOOD | {"pic": []}, GOOD | {"pic": None}]
    task = FileTask(write(folder / "x.jsonl", rows), columns={"images": "pic"})
    assert [len(example.images) for example in task] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"answer": "anwser"}, "no column 'anwser'; the columns are problem, answer"),
        ({"images": "pics"}, "columns.images: .* no column 'pics'; the columns are problem, answer"),
        ({"choices": ["a", "b"]}, "columns.choices: .* no column 'a'"),
        ({"anser": "answer"}, "columns: no field 'anser'; did you mean 'answer'"),
        ({"answer": None}, "columns.answer: cannot be turned off"),
        ({"answer": ["a", "b"]}, "columns.answer: takes one column"),
    ],
)
def test_wrong_columns(folder, columns, words):
    with pytest.raises(UserError, match=words):
        one(folder, GOOD, columns=columns)


def test_where_keeps_rows_with_these_values(folder):
    rows = [GOOD | {"level": level, "kind": kind} for level in (1, 2, 3) for kind in "ab"]
    path = write(folder / "x.jsonl", rows)
    keep = {"level": [1, 3], "kind": "b"}
    assert [example.origin[-1] for example in FileTask(path, where=keep)] == ["2", "6"]
    with pytest.raises(DataError, match=r"has no rows with \{'level': 9\}"):
        FileTask(path, where={"level": 9})
    with pytest.raises(DataError, match=r"where\.lvl: no column 'lvl'; the columns are problem"):
        FileTask(path, where={"lvl": 9})


def test_limit_counts_good_rows_and_reads_no_further(folder):
    path = write(folder / "x.jsonl", [b"bad", GOOD, GOOD, b"bad too", GOOD])
    source = DataSource(task="files", limit=2, path=path)
    task = tasks.load_all([source], on_bad_row="skip")
    assert [example.origin[-1] for example in task] == ["2", "3"]
    assert len(task.skipped) == 1
