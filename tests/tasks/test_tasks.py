import csv
import io
import json
import os
import string
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_agrae import config, tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import ConfigError, DataError, UserError
from mm_agrae.tasks.files import FileTask
from mm_agrae.tasks.images import open_image

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("MM_AGRAE_DATA", ROOT.parent / "shared" / "data"))

GOOD = {"problem": "1 + 1?", "answer": "2"}


def png(colour="red", size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows:
            file.write(row if isinstance(row, bytes) else json.dumps(row).encode())
            file.write(b"\n")
    return str(path)


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
    row = {
        "id": 17,
        "problem": "How long is x?",
        "answer": " 4 ",
        "images": ["images/red.png"],
        "level": 3,
    }
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
    ("answer", "want"), [(3, "3"), (27.0, "27"), (0.5, "0.5"), (-2, "-2"), ("007", "007")]
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
        ({"problem": "?", "answer": ["1"]}, ("answer: expected text or a number", "list")),
        (b'{"problem": "?", "answer": NaN}', ("answer: expected text or a number",)),
        (b'{"problem": "?", "answer": 1e999}', ("answer: expected text or a number",)),
        ({"problem": "", "answer": "1"}, ("question: empty",)),
        ({"problem": 5, "answer": "1"}, ("question: expected text",)),
        ({"problem": [{"role": "user"}], "answer": "1"}, ("question: expected text",)),
        (GOOD | {"images": "images/gone.png"}, ("images/gone.png", "no such file")),
        (GOOD | {"images": "images"}, ("is not a file",)),
        (GOOD | {"images": ["images/red.png", None, 3]}, ("image: expected a path or bytes",)),
        (GOOD | {"images": "../outside.png"}, ("outside.png", "lies outside")),
        (GOOD | {"images": "/etc/passwd"}, ("/etc/passwd", "lies outside")),
        (GOOD | {"images": "link.png"}, ("link.png", "lies outside")),
        (GOOD | {"images": "https://example.org/x.png"}, ("is a URL", "download")),
        (GOOD | {"images": "a\0b"}, ("not a usable path",)),
        (GOOD | {"images": "x" * 9000}, ("image x",)),
        (GOOD | {"problem": "<image> ?"}, ("1 <image> markers for 0 images",)),
        (GOOD | {"problem": "<image1> ?"}, ("0 images",)),
        (
            GOOD | {"problem": "<image><image>", "images": "images/red.png"},
            ("2 <image> markers for 1 images",),
        ),
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


def test_damaged_picture_is_named_when_it_is_decoded(folder):
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
    with pytest.raises(
        DataError, match=r"no usable row; all 2 are bad, the first: .*line 1: not JSON"
    ):
        FileTask(path, on_bad_row="skip")


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.binary() | st.text().map(str.encode), max_size=5).map(b"\n".join))
def test_arbitrary_bytes_raise_nothing_but_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        FileTask(str(path), on_bad_row="skip")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(string.printable + "é∠\ud800"),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["problem", "answer", "images", "choices", "id"])


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


# Pictures in the text


RED_LIME = ["images/red.png", "images/lime.png"]


@pytest.mark.parametrize(
    ("question", "images", "want_text", "want_images"),
    [
        ("no marker", RED_LIME, "no marker", RED_LIME),
        ("<image> or <image>?", RED_LIME, "<image> or <image>?", RED_LIME),
        ("<image1> or <image2>?", RED_LIME, "<image> or <image>?", RED_LIME),
        ("<image 2> or <image 1>?", RED_LIME, "<image> or <image>?", RED_LIME[::-1]),
        (
            "<image2>, <image1>, <image2>?",
            RED_LIME,
            "<image>, <image>, (image 2)?",
            RED_LIME[::-1],
        ),
        ("<image1> and again <image1>", RED_LIME[:1], "<image> and again (image 1)", RED_LIME[:1]),
        (
            "like\n<image1>\nor\n<image2>",
            RED_LIME[:1],
            "like\n<image>\nor\n(image 2)",
            RED_LIME[:1],
        ),
        ("", RED_LIME[:1], "", RED_LIME[:1]),
    ],
)
def test_markers_stand_for_pictures_in_order(folder, question, images, want_text, want_images):
    example = one(folder, {"problem": question, "answer": "1", "images": images})
    assert example.question == want_text
    assert example.images == tuple(str(folder / name) for name in want_images)


@pytest.mark.parametrize(
    "question", ["<image1>", "<image1><image3>", "<image0><image1>", "<image>"]
)
def test_markers_that_do_not_fit_the_pictures(folder, question):
    refused(folder, {"problem": question, "answer": "1", "images": RED_LIME}, "2 images")


def test_text_and_several_pictures_in_one_source(folder):
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
    assert [open_image(image).getpixel((0, 0)) for image in task[4].images] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    import pyarrow
    import pyarrow.parquet

    bytes_of = {name: (folder / name).read_bytes() for name in [*RED_LIME, "images/blue.png"]}
    stored = [
        row
        | {"images": [{"bytes": bytes_of[name], "path": name} for name in row.get("images") or []]}
        for row in rows
    ]
    path = folder / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), path)
    embedded = FileTask(str(path))
    assert [len(example.images) for example in embedded] == [0, 2, 0, 3, 0]
    assert [example.question for example in embedded] == [row["problem"] for row in rows]


# Pictures by URL


@pytest.fixture
def server(folder):
    """An HTTP server on this machine that counts what is asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


def test_pictures_are_fetched_where_it_is_allowed(folder, server):
    address, asked = server
    row = GOOD | {"images": [f"{address}/images/lime.png", "images/red.png"]}
    options = {"allow_urls": True, "allow_private_urls": True}
    task = FileTask(write(folder / "x.jsonl", [row, row]), **options)
    assert asked == []  # nothing is fetched before a row is used
    image, file = task[1].images
    assert image.getpixel((0, 0)) == (0, 255, 0)
    assert file == str(folder / "images" / "red.png")
    assert asked == ["/images/lime.png"]
    gone = FileTask(write(folder / "x.jsonl", [GOOD | {"image": f"{address}/gone.png"}]), **options)
    with pytest.raises(
        DataError, match=r"x\.jsonl, line 1: image http.*gone\.png: cannot be fetched"
    ):
        gone[0]


def test_private_addresses_only_if_said(folder, server):
    address, asked = server
    for host in (address, address.replace("127.0.0.1", "localhost")):
        path = write(folder / "x.jsonl", [GOOD | {"image": f"{host}/images/red.png"}])
        task = FileTask(path, allow_urls=True)
        with pytest.raises(DataError, match="private network"):
            task[0]
    assert asked == []
    for other in ("ftp://example.org/x.png", "file:///etc/passwd"):
        with pytest.raises(DataError, match="line 1: image"):
            FileTask(write(folder / "x.jsonl", [GOOD | {"image": other}]), allow_urls=True)[0]
    with pytest.raises(ConfigError, match="allow_private_urls: needs allow_urls"):
        tasks.check(DataSource(task="files", path="x", allow_private_urls=True))


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
    ("answer", "want"),
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("15", "B"), ("A\nC", "A, C"), ("A and C", "A, C")],
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


def test_picture_markers_among_the_choices(folder):
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


def test_pictures_and_choices_in_columns_of_their_own(folder):
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


def test_text_and_picture_rows_may_be_mixed(folder):
    rows = [GOOD, GOOD | {"pic": "images/red.png"}, GOOD | {"pic": []}, GOOD | {"pic": None}]
    task = FileTask(write(folder / "x.jsonl", rows), columns={"images": "pic"})
    assert [len(example.images) for example in task] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"answer": "anwser"}, "no column 'anwser'; the columns are problem, answer"),
        (
            {"images": "pics"},
            "columns.images: .* no column 'pics'; the columns are problem, answer",
        ),
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
    task = tasks.load(source, on_bad_row="skip")
    assert [example.origin[-1] for example in task] == ["2", "3"]
    assert len(task.skipped) == 1


# File formats

TABLE = [{"id": str(i), "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]


def as_table(task):
    return [{"id": e.id, "question": e.question, "answer": e.answer} for e in task]


def test_text_formats_agree(tmp_path):
    write(tmp_path / "x.jsonl", TABLE)
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(TABLE, indent=1), encoding="utf-8")
    (tmp_path / "lines.json").write_bytes((tmp_path / "x.jsonl").read_bytes())
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, TABLE[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(TABLE)
    for name in ("x.jsonl", "x.json", "lines.json", "x.csv", "x.tsv"):
        assert as_table(FileTask(str(tmp_path / name))) == TABLE, name


def test_bad_rows_of_json_and_csv(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([GOOD, 5, GOOD | {"answer": ""}]))
    task = FileTask(str(tmp_path / "x.json"), on_bad_row="skip")
    assert [", row 1: expected" in task.skipped[0], ", row 2: answer" in task.skipped[1]] == [1, 1]
    (tmp_path / "x.csv").write_bytes(
        b'question,answer\n"two\nlines",1\nfewer\n1,2,more\n\xff,1\n?,\n?,fine\n'
    )
    task = FileTask(str(tmp_path / "x.csv"), on_bad_row="skip")
    assert [example.question for example in task] == ["two\nlines", "?"]
    reasons = [reason.split("x.csv, ")[1][:14] for reason in task.skipped]
    assert reasons == ["line 4: fewer ", "line 5: more f", "line 6: not va", "line 7: answer"]


@pytest.mark.parametrize("name", ["x.parquet", "x.json", "x.csv", "x.jsonl", "x.xlsx"])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"[1,", b"\x00" * 50, b'"' * 200_001])
def test_files_that_are_not_what_they_are_called(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        FileTask(str(tmp_path / name))


def parquet(path, columns, rows=None):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_with_embedded_pictures(tmp_path):
    pictures = [[{"bytes": png(colour), "path": "x.png"}] for colour in ("red", "lime")]
    columns = {"images": pictures, "problem": ["<image>?", "?"], "answer": [1.0, 2.5]}
    task = FileTask(parquet(tmp_path / "train.parquet", columns))
    assert [example.answer for example in task] == ["1", "2.5"]
    assert open_image(task[1].images[0]).getpixel((0, 0)) == (0, 255, 0)
    assert task[1].origin == f"{tmp_path / 'train.parquet'}, row 1"


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, {"bytes": b"", "path": "no.png"}])
def test_parquet_row_without_its_picture(tmp_path, value):
    columns = {
        "image": [{"bytes": png(), "path": ""}, value],
        "problem": ["?"] * 2,
        "answer": [1] * 2,
    }
    path = parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(DataError, match=r"train\.parquet, row 1: image"):
        FileTask(path)


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow

    text = pyarrow.array([b"fine?", b"\xff\xfe?"]).view(pyarrow.utf8())
    task = FileTask(
        parquet(tmp_path / "x.parquet", {"question": text, "answer": [1, 2]}), on_bad_row="skip"
    )
    assert len(task) == 1
    assert "x.parquet, row 1: cannot be read" in task.skipped[0]


@pytest.mark.parametrize("dictionary", [False, True])
def test_saved_data_sets(tmp_path, dictionary):
    import datasets

    (tmp_path / "blue.png").write_bytes(png("blue"))
    data = datasets.Dataset.from_dict(
        {
            "images": [[str(tmp_path / "blue.png")]] * 3,
            "question": ["?"] * 3,
            "answer": ["a", "b", ""],
        }
    ).cast_column("images", datasets.Sequence(datasets.Image()))
    if dictionary:
        data = datasets.DatasetDict({"train": data, "test": data.select([2, 0])})
    data.save_to_disk(str(tmp_path / "saved"))
    split = "test" if dictionary else ""
    task = FileTask(str(tmp_path / "saved"), split=split, on_bad_row="skip")
    assert [example.answer for example in task] == (["a"] if dictionary else ["a", "b"])
    assert open_image(task[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert (
        f"saved{' [test]' if dictionary else ''}, row {0 if dictionary else 2}" in task.skipped[0]
    )
    if dictionary:
        with pytest.raises(DataError, match="set split to one of train, test"):
            FileTask(str(tmp_path / "saved"))


def test_folder_of_files(tmp_path):
    for number in range(2):
        parquet(
            tmp_path / "main" / f"train-0000{number}-of-00002.parquet",
            {"question": [f"shard {number}"], "answer": ["1"]},
        )
    write(tmp_path / "main" / "test.jsonl", [GOOD])
    write(tmp_path / "other" / "test_hard.jsonl", [GOOD, GOOD])
    write(tmp_path / ".cache" / "test.jsonl", [GOOD] * 5)
    task = FileTask(str(tmp_path), split="train")
    assert [example.question for example in task] == ["shard 0", "shard 1"]
    assert len(FileTask(str(tmp_path), split="test")) == 1
    assert len(FileTask(str(tmp_path), split="test", subset="other")) == 2
    assert len(FileTask(str(tmp_path / "other"))) == 2
    for options, words in (({}, "choose one file"), ({"split": "val"}, "nothing for split='val'")):
        with pytest.raises(DataError, match=rf"{words}.*main/test\.jsonl"):
            FileTask(str(tmp_path), **options)


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/gone.jsonl", "data/geometry3k", "gone.jsonl", "a/b/c/train.jsonl"):
        with pytest.raises(
            DataError, match=rf"{path}: no such file or folder .*data\.train\.0\.path"
        ):
            FileTask(path)


def test_hub_data_set_without_a_network_says_what_to_fetch(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        FileTask("hiyouga/geometry3k", split="train")
    message = str(caught.value)
    assert "hf download hiyouga/geometry3k --repo-type dataset" in message
    assert "path=data/downloads/geometry3k" in message


# Options and names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "x.jsonl", "spilt": "a"}, "no option 'spilt'; did you mean 'split'"),
        ({"path": "x.jsonl", "on_bad_row": "skip"}, "no option 'on_bad_row'"),
        ({}, "needs the option 'path'"),
        ({"path": 3}, r"path: .*valid string \(got 3\)"),
        ({"path": "x.jsonl", "meta": "level"}, "meta: "),
        ({"path": "x.jsonl", "meta": [1]}, r"meta: .*string \(got 1\)"),
        ({"path": "x.jsonl", "show_choices": "no"}, "show_choices: .*boolean"),
        ({"path": "x.jsonl", "columns": "answer"}, "columns: .*valid dictionary"),
        ({"path": "x.jsonl", "columns": {"answer": 3}}, "columns.answer.*got 3"),
        ({"path": "x.jsonl", "columns": {"anwser": "a"}}, "columns: no field 'anwser'; .*'answer'"),
        ({"path": "x.jsonl", "grading": {"knid": "math"}}, "grading: no option 'knid'; .*'kind'"),
        ({"path": "x.jsonl", "grading": {"kind": "maths"}}, "grading: kind: .*'math'"),
    ],
)
def test_wrong_options_are_named_before_any_data_is_read(options, words):
    source = DataSource(task="files", name="geo", **options)
    with pytest.raises(ConfigError, match=f"data source 'geo': .*{words}"):
        tasks.check(source)
    with pytest.raises(ConfigError, match=words):
        tasks.load(source)


def test_unknown_tasks():
    with pytest.raises(ConfigError, match="no task 'file'; did you mean 'files'"):
        tasks.check(DataSource(task="file"))
    for name in ("no_such_module:Task", "mm_agrae.tasks.files:NoTask"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            tasks.check(DataSource(task=name))


def test_check_reads_no_data():
    tasks.check(DataSource(task="files", path="/no/such/file.jsonl", columns={"answer": "a"}))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_named_task_exists(name):
    if name == "gym":
        pytest.importorskip("reasoning_gym")
    required = {"files": {"path": "x.jsonl"}, "gym": {"names": "countdown"}}
    tasks.check(DataSource(task=name, **required.get(name, {})))
    assert tasks.describe(name).startswith(name)


def test_own_task_and_concatenation(tmp_path, monkeypatch):
    (tmp_path / "my_task_module.py").write_text(
        "from mm_agrae.types import Example\n"
        "class Doubles:\n"
        "    def __init__(self, count: int = 4):\n"
        "        self.count = count\n"
        "    def __len__(self):\n"
        "        return self.count\n"
        "    def __getitem__(self, i):\n"
        "        return Example(str(i), f'2 * {i}?', str(2 * i))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"task": "my_task_module:Doubles"}
    files = {"task": "files", "path": write(tmp_path / "x.jsonl", [b"bad", *TABLE])}
    sources = [DataSource(**own, limit=2), DataSource(**files), DataSource(**own, limit=9)]
    joined = tasks.load_all(sources, on_bad_row="skip")
    assert [e.answer for e in joined] == ["0", "2", "1", "2", "3", "4", "5", "0", "2", "4", "6"]
    assert len(joined) == 11
    assert len(joined.skipped) == 1
    with pytest.raises(IndexError):
        joined[11]
    with pytest.raises(ConfigError, match=r"count: .*integer \(got 'x'\)"):
        tasks.check(DataSource(**own, count="x"))


@pytest.mark.parametrize("name", ["geometry3k", "math", "gsm8k"])
def test_shipped_configs(name):
    settings = config.load(ROOT / "configs" / f"{name}.yaml")
    for source in (*settings.data.train, *settings.data.evaluate):
        tasks.check(source)
        assert source.task in tasks.TASKS
        # Data are looked for by name, not in a folder of somebody's machine.
        assert "path" not in source.options


# Real data, where it is at hand

needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no data folder (set MM_AGRAE_DATA to one)"
)


@needs_data
@pytest.mark.parametrize(
    ("file", "rows", "pictures", "choices"),
    [
        ("math/train.jsonl", 7468, 0, 0),
        ("math/math500.jsonl", 500, 0, 0),
        ("math/test_rest.jsonl", 4500, 0, 0),
        ("gsm8k/train.jsonl", 7473, 0, 0),
        ("gsm8k/test.jsonl", 1319, 0, 0),
        ("aime2024/test.jsonl", 30, 0, 0),
        ("amc23/test.jsonl", 40, 0, 0),
        ("geometry3k/train.jsonl", 1311, 1311, 1311),
        ("geometry3k/val.jsonl", 211, 211, 211),
        ("geometry3k/test.jsonl", 408, 408, 408),
        ("mathvision/test_subset.jsonl", 509, 509, 268),
        ("mathverse/testmini_subset.jsonl", 570, 449, 108),
        ("vqa_rad/train.jsonl", 1359, 1359, 0),
        ("vqa_rad/test.jsonl", 361, 361, 0),
    ],
)
def test_real_data_loads_whole(file, rows, pictures, choices):
    task = FileTask(str(SHARED / file))
    assert (len(task), task.skipped) == (rows, [])
    examples = list(task)
    assert sum(len(example.images) for example in examples) == pictures
    assert sum(example.grading.get("kind") == "choice" for example in examples) == choices
    for example in examples:
        assert example.question.count("<image>") in (0, len(example.images))
    for example in examples[:: max(1, rows // 8)]:
        for source in example.images:
            assert open_image(source, origin=example.origin).mode == "RGB"


@needs_data
def test_geometry3k_by_letter_and_by_value():
    path = str(SHARED / "geometry3k" / "test.jsonl")
    letter = FileTask(path, limit=1)[0]
    assert letter.question == (
        "Find x. Round to the nearest tenth.\n(A) 18.8\n(B) 23.2\n(C) 25.9\n(D) 44.0"
    )
    assert (letter.answer, letter.grading["kind"]) == ("A", "choice")
    value = FileTask(path, limit=1, columns={"answer": "answer_value", "choices": None})[0]
    assert value.question == "Find x. Round to the nearest tenth."
    assert (value.answer, value.grading) == ("18.8", {})


@needs_data
def test_vqa_rad_closed_and_open():
    path = str(SHARED / "vqa_rad" / "test.jsonl")
    counts = {kind: len(FileTask(path, where={"answer_type": kind})) for kind in ("closed", "open")}
    assert sum(counts.values()) == 361
    closed = FileTask(path, where={"answer_type": "closed", "modality": ["CT", "MRI"]})
    assert Counter(example.answer.lower() for example in closed).most_common(1)[0][0] in (
        "yes",
        "no",
    )
