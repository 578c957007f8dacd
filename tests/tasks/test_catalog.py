"""The named data sets: every copy of one gives the same examples, and what is missing is said."""

from pathlib import Path

import pytest
from data_files import contents, embedded, hub_cache, hub_parquet, jsonl, load, png_of

from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.tasks import catalog, medical
from mm_agrae.tasks.catalog import CATALOG

ENTRIES = CATALOG | medical.CATALOG


# One entry each: rows in our form, the same rows as the hub stores them, and what must result.
CHOICES = ["12", "15", "9", "7"]
LINES = "\n(A) 12\n(B) 15\n(C) 9\n(D) 7"
SAME = {
    "geometry3k": (
        "test.jsonl",
        [
            {"problem": "Find x.", "choices": CHOICES, "answer": "B", "answer_value": "15",
             "images": [png_of(1)]},
        ],
        "data/test-00000-of-00001.parquet",
        [
            {"images": [embedded(1)], "problem": "<image>Find x.", "answer": "15", "id": 2403,
             "choices": CHOICES, "ground_truth": "B"},
        ],
        {"split": "test"},
        [("Find x.", "15", {})],
    ),
    "geometry3k by letter": (
        "test.jsonl",
        [
            {"problem": "Find x.", "choices": CHOICES, "answer": "B", "answer_value": "15",
             "images": [png_of(1)]},
        ],
        "data/test-00000-of-00001.parquet",
        [
            {"images": [embedded(1)], "problem": "<image>Find x.", "answer": "15", "id": 2403,
             "choices": CHOICES, "ground_truth": "B"},
        ],
        {"split": "test", "ask": "letter"},
        [("Find x." + LINES, "B", {"kind": "choice", "choices": CHOICES})],
    ),
    "math": (
        "math500.jsonl",
        [{"problem": "$1+1$?", "answer": "2", "subject": "Algebra", "level": 5}],
        "data/math500-00000-of-00001.parquet",
        [{"problem": "$1+1$?", "level": "Level 5", "type": "Algebra", "id": "test/1.json",
          "solution": r"So \boxed{2}.", "expected_answer": "2"}],
        {"split": "test", "where": {"level": [4, 5], "subject": "Algebra"}},
        [("$1+1$?", "2", {})],
    ),
    "gsm8k": (
        "train.jsonl",
        [{"problem": "How many?", "answer": "1200"}],
        "main/train-00000-of-00001.parquet",
        [{"question": "How many?", "answer": "1000 + 200 = <<1000+200=1200>>1200\n#### 1,200"}],
        {},
        [("How many?", "1200", {})],
    ),
    "aime2024": (
        "test.jsonl",
        [{"problem": "Find N.", "answer": "25"}],
        "data/train-00000-of-00001.parquet",
        [{"id": 60, "problem": "Find N.", "solution": "…", "answer": "025", "url": "",
          "year": "2024"}],
        {},
        [("Find N.", "25", {})],
    ),
    "amc23": (
        "test.jsonl",
        [{"problem": "Find N.", "answer": "27"}],
        "test-00000-of-00001.parquet",
        [{"id": 0, "question": "Find N.", "answer": 27.0, "url": ""}],
        {},
        [("Find N.", "27", {})],
    ),
    "mathvision": (
        "test_subset.jsonl",
        [
            {"problem": "Which?\n<image1>", "choices": ["A", "B"], "answer": "B",
             "testmini": True, "images": [png_of(2)]},
            {"problem": "<image1> How many?", "choices": [], "answer": "6", "testmini": False,
             "images": [png_of(3)]},
        ],
        "data/test-00000-of-00001-3532b8d3f1b4047a.parquet",
        [
            {"id": "1", "question": "Which?\n<image1>", "options": ["A", "B"],
             "image": "images/1.jpg", "decoded_image": embedded(2), "answer": "B", "level": 1},
            {"id": "2", "question": "<image1> How many?", "options": [],
             "image": "images/2.jpg", "decoded_image": embedded(3), "answer": "6", "level": 1},
        ],
        {"split": "test"},
        [
            ("Which?\n<image>\n(A)\n(B)", "B", {"kind": "choice", "choices": ["A", "B"]}),
            ("<image> How many?", "6", {}),
        ],
    ),
    "mathverse": (
        "testmini_subset.jsonl",
        [
            {"problem": "What is CED?", "choices": ["A:40°", "B:60°"], "answer": "A",
             "problem_version": "Text Lite", "question_type": "multi_choice",
             "images": [png_of(4)]},
            {"problem": "", "choices": None, "answer": "(-2,1]", "problem_version": "Vision Only",
             "question_type": "free_form", "images": [png_of(5)]},
        ],
        "testmini.parquet",
        [
            {"sample_index": "1", "question": "What is CED?\nChoices:\nA:40°\nB:60°",
             "image": embedded(4), "answer": "A", "problem_version": "Text Lite",
             "question_type": "multi_choice", "metadata": {"subject": "Plane Geometry"}},
            {"sample_index": "2", "question": "", "image": embedded(5), "answer": "(-2,1]",
             "problem_version": "Vision Only", "question_type": "free_form",
             "metadata": {"subject": "Functions"}},
        ],
        {},
        [
            ("What is CED?\n(A) 40°\n(B) 60°", "A", {"kind": "choice", "choices": ["40°", "60°"]}),
            ("", "(-2,1]", {}),
        ],
    ),
    "vqa_rad": (
        "test.jsonl",
        [
            {"problem": "Normal?", "answer": "Yes", "answer_type": "closed", "images": [png_of(6)]},
            {"problem": "Where?", "answer": "Left lung", "answer_type": "open",
             "images": [png_of(7)]},
            {"problem": "How big?", "answer": "5mm", "answer_type": "open", "images": [png_of(7)]},
        ],
        "data/test-00000-of-00001-e5bc3d208bb4deeb.parquet",
        [
            {"image": embedded(6), "question": "Normal?", "answer": "Yes"},
            {"image": embedded(7), "question": "Where?", "answer": "Left lung"},
            {"image": embedded(7), "question": "How big?", "answer": "5mm"},
        ],
        {"split": "test"},
        [
            ("Normal?", "Yes", {"kind": "yes_no"}),
            ("Where?", "Left lung", {"kind": "text"}),
            ("How big?", "5mm", {"kind": "number"}),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_our_files_and_the_hub_give_the_same_examples(tmp_path, case):
    ours, our_rows, hub, hub_rows, options, want = SAME[case]
    name = case.split()[0]
    first = load(name, jsonl(tmp_path / "ours", ours, our_rows), **options)
    second = load(name, hub_parquet(tmp_path / "hub", hub, hub_rows), **options)
    assert contents(first) == contents(second)
    assert [(e.question, e.answer, dict(e.grading)) for e in first] == want
    # The file itself, and a copy that `datasets` has saved.
    third = load(name, tmp_path / "hub" / hub, **options)
    assert contents(third) == contents(first)


def test_copies_saved_by_datasets_keep_the_names_of_the_hub(tmp_path):
    import datasets

    rows = SAME["math"][3]
    data = datasets.DatasetDict({"math500": datasets.Dataset.from_list(rows)})
    data.save_to_disk(str(tmp_path / "math"))
    assert contents(load("math", tmp_path / "math", split="test")) == [("$1+1$?", "2", {}, [])]
    with pytest.raises(DataError, match="set split to one of math500"):
        load("math", tmp_path / "math", split="train")


def test_several_files_of_a_split_are_read_in_order(tmp_path):
    for number in (1, 0):
        hub_parquet(tmp_path, f"main/test-0000{number}-of-00002.parquet",
                [{"question": f"{number}?", "answer": f"#### {number}"}])  # fmt: skip
    assert [e.answer for e in load("gsm8k", tmp_path, split="test")] == ["0", "1"]


def test_math500_is_found_in_the_folder_of_math(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(Path("data/downloads/math"), "math500.jsonl", [{"problem": "?", "answer": "1"}])
    assert len(tasks.load_all([DataSource(task="math500")])) == 1
    assert len(tasks.load_all([DataSource(task="math", split="test")])) == 1
    hub_parquet(Path("data/downloads/math"), "data/test-0.parquet", [{"problem": "?", "answer": 1}] * 2)
    assert len(tasks.load_all([DataSource(task="math500")])) == 1  # not the 5,000 of the hub's test


def test_testmini_of_a_file_that_holds_all(tmp_path):
    jsonl(tmp_path, *SAME["mathvision"][:2])
    assert len(load("mathvision", tmp_path, split="testmini")) == 1
    assert len(load("mathvision", tmp_path)) == 2
    rows = [{"problem": "?", "answer": "1", "problem_version": v} for v in ("Text Only", "Text Lite")]
    jsonl(tmp_path, "testmini_subset.jsonl", rows)
    assert len(load("mathverse", tmp_path, split="testmini_text_only")) == 1
    versions = {"problem_version": ["Text Lite", "Vision Only"]}
    assert len(load("mathverse", tmp_path, where=versions)) == 1


# Where a data set is looked for


def test_path_then_downloads_then_hub(offline):
    _, rows, hub, hub_rows, _, _ = SAME["aime2024"]

    def found(**options):
        (example,) = tasks.load_all([DataSource(task="aime2024", **options)])
        return example.origin.split(",")[0]

    hub_parquet(hub_cache(offline / "cache", CATALOG["aime2024"].hub), hub, hub_rows)
    assert "snapshots" in found()
    jsonl(Path("data/downloads/aime2024"), "test.jsonl", rows)
    assert found() == "data/downloads/aime2024/test.jsonl"
    jsonl(Path("elsewhere"), "test.jsonl", rows)
    assert found(path="elsewhere") == "elsewhere/test.jsonl"
    assert found(path="elsewhere/test.jsonl") == "elsewhere/test.jsonl"


@pytest.mark.parametrize("name", ENTRIES)
def test_without_a_network_it_is_said_what_to_fetch(offline, name):
    entry = ENTRIES[name]
    folder = f"data/downloads/{(entry.folders or (name,))[0]}"
    for options in ({}, {"path": "gone"}):
        with pytest.raises(DataError) as caught:
            tasks.load_all([DataSource(task=name, **options)])
        message = str(caught.value)
        command = f"hf download {entry.hub} --repo-type dataset --local-dir {folder}"
        for word in (command, f"copy that folder to {folder}", "set path", *options.values()):
            assert word in message
        assert ("unzip" in message) == bool(entry.archive)
        assert len(message) < 1500


def test_folder_without_the_split_lists_its_files(tmp_path):
    jsonl(tmp_path, "test.jsonl", [{"problem": "?", "answer": "1"}])
    with pytest.raises(DataError, match=r"nothing for split='train'; the data files are test\.jsonl"):
        load("gsm8k", tmp_path)


# Errors


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("geometry3k", {"split": "tets"}, "no split 'tets'; did you mean 'test'?; the splits are "
         "train, validation, test"),
        ("math500", {"split": "train"}, "no split 'train'; valid: test"),
        ("medical_ct", {"split": "train"}, "no split 'train'"),
        ("geometry3k", {"ask": "number"}, "ask: 'number'; valid: value, letter"),
        ("gsm8k", {"ask": "letter"}, "gsm8k: ask: 'letter'; it has no such option"),
        ("gsm8k", {"spilt": "test"}, "no option 'spilt'; did you mean 'split'"),
        ("gsm8k", {"subset": "main"}, "no option 'subset'"),
        ("gsm8k", {"limti": 1}, "no option 'limti'"),
        ("medical_ct", {"show_choices": "no"}, "show_choices: input should be a valid boolean"),
        ("math", {"grading": {"knid": "math"}}, "grading: no option 'knid'"),
        ("vqa_rad", {"columns": {"anwser": "a"}}, "columns: no field 'anwser'"),
        ("vqa-rad", {}, "no task 'vqa-rad'; did you mean 'vqa_rad'"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_before_any_data_is_read(task, options, words):
    with pytest.raises(ConfigError) as caught:
        tasks.check(DataSource(task=task, **options))
    assert words in str(caught.value)


ROW = {"problem": "Find x.", "answer": "15", "images": [embedded(1)]}


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"text": "Find x.", "answer": "1"}, {}, "no question: none of problem, question, prompt, "
         "messages, conversations, conversation, query among the columns text, answer"),
        (ROW, {"columns": {"answer": "gold"}}, "no column 'gold'; the columns are problem, answer"),
        (ROW, {"where": {"level": 3}}, "where.level: no column 'level'; the columns are"),
        (ROW, {"ask": "letter"}, "ask=letter, but it has no choices; the columns are problem"),
        (ROW | {"choices": CHOICES, "ground_truth": "x"}, {"ask": "letter"},
         "neither a letter up to D nor the text of one choice"),
        (ROW | {"images": [{"bytes": None, "path": "img.png"}]}, {}, "image img.png: no such file"),
        (ROW | {"images": ["https://example.org/x.png"]}, {}, "x.png: URLs are not fetched"),
    ],
)  # fmt: skip
def test_bad_rows_of_every_form_are_named(tmp_path, row, options, words):
    import datasets

    hub_parquet(tmp_path / "hub", "data/train-00000-of-00001.parquet", [row])
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row])}).save_to_disk(str(tmp_path / "saved"))
    for place in (tmp_path / "hub", tmp_path / "saved"):
        with pytest.raises((DataError, ConfigError)) as caught:
            load("geometry3k", place, **options)
        assert str(place) in str(caught.value)
        assert words in str(caught.value)


def test_a_cut_parquet_file(tmp_path):
    hub_parquet(tmp_path, "data/train-00000-of-00001.parquet", [ROW])
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: cannot be read"):
        load("geometry3k", tmp_path)


# The catalog itself


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_consistent_and_described(name):
    entry = ENTRIES[name]
    assert set(entry.rows) == set(entry.files)
    assert set(entry.split_where) | set(entry.saved_as) <= set(entry.files)
    text = tasks.describe(name)
    folder = (entry.folders or (name,))[0]
    command = f"hf download {entry.hub} --repo-type dataset --local-dir data/downloads/{folder}"
    for word in (command, entry.licence, *entry.files):
        assert word in text


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("Yes", "yes_no"), ("no.", "yes_no"), ("5mm", "number"), ("5.6 cm", "number"), 
     ("5%", "number"), ("2", "number"), ("4th ventricle", "text"), ("4th", "text"), ("T2", "text"),
     ("2.5cm x 1.7cm", "text"), ("Not sure.", "text"), ("right", "text")],
)  # fmt: skip
def test_kinds_of_medical_answers(answer, kind):
    assert catalog._medical_kind(answer) == kind
