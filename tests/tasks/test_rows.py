"""File formats, folders and hub data sets: the same rows from all, damage is named."""

import csv
import json

import pytest
from data_files import GOOD, parquet, png, write

from mm_agrae.errors import DataError, UserError
from mm_agrae.tasks.files import FileTask
from mm_agrae.tasks.images import open_image

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
    (tmp_path / "x.csv").write_bytes(b'question,answer\n"two\nlines",1\nfewer\n1,2,more\n\xff,1\n?,\n?,fine\n')
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


def test_parquet_with_embedded_images(tmp_path):
    images = [[{"bytes": png(colour), "path": "x.png"}] for colour in ("red", "lime")]
    columns = {"images": images, "problem": ["<image>?", "?"], "answer": [1.0, 2.5]}
    task = FileTask(parquet(tmp_path / "train.parquet", columns))
    assert [example.answer for example in task] == ["1", "2.5"]
    assert open_image(task[1].images[0]).getpixel((0, 0)) == (0, 255, 0)
    assert task[1].origin == f"{tmp_path / 'train.parquet'}, row 1"


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, {"bytes": b"", "path": "no.png"}])
def test_parquet_row_without_its_image(tmp_path, value):
    columns = {"image": [{"bytes": png(), "path": ""}, value], "problem": ["?"] * 2, "answer": [1] * 2}
    path = parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(DataError, match=r"train\.parquet, row 1: image"):
        FileTask(path)


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow

    text = pyarrow.array([b"fine?", b"\xff\xfe?"]).view(pyarrow.utf8())
    task = FileTask(parquet(tmp_path / "x.parquet", {"question": text, "answer": [1, 2]}), on_bad_row="skip")
    assert len(task) == 1
    assert "x.parquet, row 1: cannot be read" in task.skipped[0]


@pytest.mark.parametrize("dictionary", [False, True])
def test_saved_data_sets(tmp_path, dictionary):
    import datasets

    (tmp_path / "blue.png").write_bytes(png("blue"))
    data = datasets.Dataset.from_dict(
        {"images": [[str(tmp_path / "blue.png")]] * 3, "question": ["?"] * 3, "answer": ["a", "b", ""]}
    ).cast_column("images", datasets.Sequence(datasets.Image()))
    if dictionary:
        data = datasets.DatasetDict({"train": data, "test": data.select([2, 0])})
    data.save_to_disk(str(tmp_path / "saved"))
    split = "test" if dictionary else ""
    task = FileTask(str(tmp_path / "saved"), split=split, on_bad_row="skip")
    assert [example.answer for example in task] == (["a"] if dictionary else ["a", "b"])
    assert open_image(task[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert f"saved{' [test]' if dictionary else ''}, row {0 if dictionary else 2}" in task.skipped[0]
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
        with pytest.raises(DataError, match=rf"{path}: no such file or folder .*data\.train\.0\.path"):
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
