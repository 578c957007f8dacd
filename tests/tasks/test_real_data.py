"""Published data: every data set by its name, in both of its forms, and the shipped configs on it.

The small model solves none of it; that the path is whole is the point.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import REAL_DATA

from mm_agrae import config as configs
from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import DataError
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.tasks.files import FileTask
from mm_agrae.tasks.images import open_image
from mm_agrae.tasks.rows import read_rows
from mm_agrae.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"


needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no data sets; set MM_AGRAE_DATA")


def load(task, folder=None, **options):
    path = REAL_DATA / (folder or task)
    if not path.exists():
        pytest.skip(f"no {path}")
    return tasks.load_all([DataSource(task=task, path=str(path), **options)])


ROWS = {
    "geometry3k": {"train": (1311, 1311), "validation": (211, 211), "test": (408, 408)},
    "math": {"train": (7468, 0), "test": (500, 0), "test_rest": (4500, 0)},
    "gsm8k": {"train": (7473, 0), "test": (1319, 0)},
    "aime2024": {"test": (30, 0)},
    "amc23": {"test": (40, 0)},
    "mathvision": {"test": (509, 509), "testmini": (219, 219)},
    "mathverse": {"testmini": (570, 449), "testmini_text_only": (121, 0)},
    "vqa_rad": {"train": (1359, 1359), "test": (361, 361)},
}
"""Rows and images of each split, as the description beside the data counts them."""


@needs_data
@pytest.mark.parametrize(("name", "split"), [(n, split) for n in ROWS for split in ROWS[n]])
def test_every_data_set_loads_by_its_name(name, split):
    task = load(name, split=split)
    rows, images = ROWS[name][split]
    examples = list(task)
    assert (len(examples), task.skipped) == (rows, [])
    assert sum(len(example.images) for example in examples) == images
    assert len({example.id for example in examples}) == rows
    for example in examples:
        assert example.question.count("<image>") in (0, len(example.images))
        assert example.question.strip() or example.images
    for example in examples[:: max(1, rows // 8)]:
        for image in example.images:
            assert open_image(image, origin=example.origin).mode == "RGB"


@needs_data
@pytest.mark.parametrize(
    ("file", "rows", "choices"),
    [
        ("geometry3k/train.jsonl", 1311, 1311),
        ("geometry3k/val.jsonl", 211, 211),
        ("geometry3k/test.jsonl", 408, 408),
        ("mathvision/test_subset.jsonl", 509, 268),
        ("mathverse/testmini_subset.jsonl", 570, 108),
        ("vqa_rad/test.jsonl", 361, 0),
    ],
)
def test_the_same_files_without_a_catalog_entry(file, rows, choices):
    task = FileTask(str(REAL_DATA / file))
    assert (len(task), task.skipped) == (rows, [])
    assert sum(example.grading.get("kind") == "choice" for example in task) == choices


@needs_data
def test_geometry3k_by_letter_and_by_value():
    path = str(REAL_DATA / "geometry3k" / "test.jsonl")
    letter = FileTask(path, limit=1)[0]
    assert letter.question == ("Find x. Round to the nearest tenth.\n(A) 18.8\n(B) 23.2\n(C) 25.9\n(D) 44.0")
    assert (letter.answer, letter.grading["kind"]) == ("A", "choice")
    value = FileTask(path, limit=1, columns={"answer": "answer_value", "choices": None})[0]
    assert value.question == "Find x. Round to the nearest tenth."
    assert (value.answer, value.grading) == ("18.8", {})


@needs_data
def test_vqa_rad_closed_and_open():
    path = str(REAL_DATA / "vqa_rad" / "test.jsonl")
    counts = {kind: len(FileTask(path, where={"answer_type": kind})) for kind in ("closed", "open")}
    assert sum(counts.values()) == 361
    closed = FileTask(path, where={"answer_type": "closed", "modality": ["CT", "MRI"]})
    assert Counter(example.answer.lower() for example in closed).most_common(1)[0][0] in ("yes", "no")


@needs_data
def test_math500_from_the_folder_of_math():
    assert [e.question for e in load("math500", "math")] == [e.question for e in load("math", split="test")]


@needs_data
def test_images_of_a_data_set_are_as_many_as_described():
    files = {
        name: {image for split in ROWS[name] for e in load(name, split=split) for image in e.images}
        for name in ("geometry3k", "mathvision", "mathverse", "vqa_rad")
    }
    counts = {name: len(found) for name, found in files.items()}
    assert counts == {"geometry3k": 1189, "mathvision": 509, "mathverse": 184, "vqa_rad": 242}


@needs_data
def test_answers_are_graded_by_the_right_kind():
    def kinds(name, **options):
        return {example.grading.get("kind", "auto") for example in load(name, **options)}

    assert kinds("geometry3k") == {"auto"}
    assert kinds("geometry3k", ask="letter") == {"choice"}
    assert kinds("mathvision") == kinds("mathverse") == {"auto", "choice"}
    assert kinds("vqa_rad") == {"yes_no", "text", "number"}
    closed = load("vqa_rad", where={"answer_type": "closed"})
    yes_no = [e for e in closed if e.grading["kind"] == "yes_no"]
    assert len(closed) - len(yes_no) < 0.1 * len(closed)
    for name in ("aime2024", "amc23", "gsm8k"):
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", e.answer) for e in load(name, split="test"))
    versions = {"problem_version": "Vision Only", "question_type": "free_form"}
    assert len(load("mathverse", where=versions)) == 42
    with pytest.raises(DataError, match=r"where\.version: no column 'version'; the columns are id, "):
        load("mathverse", where={"version": "Vision Only"})


def embedded(row, folder):
    return [{"bytes": (folder / path).read_bytes(), "path": Path(path).name} for path in row["images"]]


def choice_lines(row):
    lines = "".join(f"\n{line}" for line in row["choices"] or [])
    return f"{row['problem']}\nChoices:{lines}" if lines else row["problem"]


HUB = {
    "geometry3k": ("test", "data/test-00000-of-00001.parquet", lambda row, folder: {
        "images": embedded(row, folder), "problem": "<image>" + row["problem"],
        "answer": row["answer_value"], "id": int(row["id"].split("-")[1]),
        "choices": row["choices"], "ground_truth": row["answer"],
    }),
    "math": ("test", "data/math500-00000-of-00001.parquet", lambda row, folder: {
        "problem": row["problem"], "level": f"Level {row['level']}", "type": row["subject"],
        "solution": row["solution"], "id": row["id"], "expected_answer": row["answer"],
    }),
    "math500": ("test", "test.jsonl", None),
    "gsm8k": ("test", "main/test-00000-of-00001.parquet", lambda row, folder: {
        "question": row["problem"], "answer": f"{row['solution']}\n#### {row['answer']}",
    }),
    "aime2024": ("test", "data/train-00000-of-00001.parquet", lambda row, folder: {
        "problem": row["problem"], "answer": row["answer"].rjust(3, "0"), "year": "2024",
    }),
    "amc23": ("test", "test-00000-of-00001.parquet", lambda row, folder: {
        "question": row["problem"], "answer": float(row["answer"]), "url": row["url"],
    }),
    "mathvision": ("test", "data/test-00000-of-00001.parquet", lambda row, folder: {
        "id": row["id"], "question": row["problem"], "options": row["choices"],
        "image": row["images"][0], "decoded_image": embedded(row, folder)[0],
        "answer": row["answer"], "level": row["level"], "subject": row["subject"],
    }),
    "mathverse": ("testmini", "testmini.parquet", lambda row, folder: {
        "sample_index": row["id"], "problem_version": row["problem_version"],
        "question": choice_lines(row), "image": (embedded(row, folder) or [None])[0],
        "answer": row["answer"], "question_type": row["question_type"],
        "metadata": {"subject": row["subject"], "subfield": row["subfield"]},
    }),
    "vqa_rad": ("test", "data/test-00000-of-00001.parquet", lambda row, folder: {
        "image": embedded(row, folder)[0], "question": row["problem"], "answer": row["answer"],
    }),
}  # fmt: skip
"""Of each data set: a split, the hub's file for it, and a row of ours in the hub's columns."""


@needs_data
@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("ask", ["value", "letter"])
def test_the_hubs_form_of_real_rows_gives_the_same_examples(tmp_path, name, ask):
    if ask == "letter" and name != "geometry3k":
        pytest.skip("asks for one kind of answer")
    options = {"ask": ask} if name == "geometry3k" else {}
    split, file, as_on_the_hub = HUB[name]
    folder = "math" if name == "math500" else name
    ours = load(name, folder, split=split, **options)
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    if as_on_the_hub is None:
        shutil.copy(REAL_DATA / "math" / "math500.jsonl", target)
    else:
        source = Path(ours[0].origin.split(",")[0])
        rows = [as_on_the_hub(row, source.parent) for row in read(source)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    hub = tasks.load_all([DataSource(task=name, path=str(tmp_path), split=split, **options)])
    assert len(ours) == len(hub)
    step = max(1, len(ours) // 20)
    for index in range(len(ours)):
        a, b = ours[index], hub[index]
        assert (a.question, a.answer, a.grading) == (b.question, b.answer, b.grading)
        assert len(a.images) == len(b.images)
        if index % step == 0:
            for one, other in zip(a.images, b.images, strict=True):
                assert open_image(one).tobytes() == open_image(other).tobytes()


def read(path):
    return [row() for _, _, row in read_rows(str(path))]


@needs_data
@pytest.mark.parametrize("name", ["geometry3k", "math", "gsm8k"])
def test_a_shipped_config_trains_on_its_data(tmp_path, name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    shipped = configs.load(CONFIGS / f"{name}.yaml")
    sources = {"train": shipped.data.train, "evaluate": shipped.data.evaluate}
    paths = [
        f"data.{split}.{index}.path={REAL_DATA / name}"
        for split, found in sources.items()
        for index in range(len(found))
    ]
    limits = [f"data.evaluate.{index}.limit=2" for index in range(len(shipped.data.evaluate))]
    config = configs.load(
        CONFIGS / f"{name}.yaml",
        [*paths, *limits, f"run_dir={tmp_path}", "train.steps=2", "rollout.max_new_tokens=32",
         "evaluate.samples=2", "evaluate.max_new_tokens=32"],
    )  # fmt: skip
    Trainer(config, Reporter(enabled=False)).train()
    run = RunFolder(tmp_path)
    for row in run.read_metrics():
        assert 0 <= row["success/mean"] <= 1
        assert 0 < row["completions/mean_tokens"] <= 32
        assert row["update/grad_norm"] >= 0
    records = run.read_rollouts(1)
    assert all(record["answer"] for record in records)
    assert bool(records[0]["images"]) == (name == "geometry3k")
    assert {result.name for result in run.read_evaluations()} == {"before", "after"}
