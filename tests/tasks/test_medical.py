"""The medical pairs: the same choice on every machine, no image in both training and test."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from data_files import contents, hub_cache, jsonl, load, png_of

from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import DataError
from mm_agrae.tasks import medical
from mm_agrae.tasks.images import open_image


def medical_folder(folder, modalities=("medical_mri", "medical_ct"), images=1100):
    """A bundle as on the hub, unpacked; every tenth image has a copy under another name."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for name in modalities:
        for number in range(images):
            file = f"images/{name}{number:06}.png"
            (folder / file).write_bytes(png_of(number - number % 10 // 9))
            rows.append({
                "image": [file], "question": "What is seen?", "options": ["Lung", "Liver", "Brain"],
                "answer": "Liver", "dataset": "OmniMedVQA", "subset": medical.SUBSETS[name],
            })  # fmt: skip
    for row in rows[::50]:  # not to be graded: the answer is two options, or none
        row["options"] = ["Liver", "Lung", "Liver"] if row is rows[0] else ["Lung", "Brain"]
    other = rows[0] | {"dataset": "VQA-RAD", "subset": None, "answer": "not among the options"}
    (folder / medical.BUNDLE).write_text(json.dumps([other, *rows]))
    return rows


def pixels(task):
    return {open_image(example.images[0]).tobytes() for example in task}


def test_medical_pairs(tmp_path):
    medical_folder(tmp_path)
    train = load("medical_mri", tmp_path, split="train")
    test = load("medical_mri", tmp_path, split="test")
    assert (len(train), len(test)) == (600, 300)
    assert len(pixels(train)) == 600
    assert len(pixels(test)) == 300
    assert not pixels(train) & pixels(test)
    assert train[0].question == "What is seen?\n(A) Lung\n(B) Liver\n(C) Brain"
    assert (train[0].answer, train[0].grading["kind"]) == ("B", "choice")
    assert len(load("medical_ct", tmp_path)) == 300
    with pytest.raises(DataError, match="no rows with dataset 'OmniMedVQA' and subset 'X-Ray'"):
        load("medical_xray", tmp_path)
    # The choice depends on the names alone, not on the order of the file.
    rows = json.loads((tmp_path / medical.BUNDLE).read_text())
    (tmp_path / medical.BUNDLE).write_text(json.dumps(rows[::-1]))
    again = load("medical_mri", tmp_path, split="train")
    assert [e.images for e in again] == [e.images for e in train]
    names = [f"images/medical_mri{number:06}.png" for number in range(1100) if number % 50]
    in_order = sorted(names, key=lambda name: hashlib.sha256(f"{name}\nWhat is seen?".encode()).hexdigest())
    assert str(test[0].images[0]).endswith(in_order[0])


def test_medical_test_as_published(tmp_path):
    rows = medical_folder(tmp_path)
    listed = [row | {"problem": "…", "solution": "B"} for row in rows[51:91] + rows[1151:1191]]
    (tmp_path / "published.json").write_text(json.dumps(listed))
    options = {"test_list": str(tmp_path / "published.json")}
    test = load("medical_mri", tmp_path, split="test", **options)
    assert [Path(e.images[0]).name for e in test] == [Path(r["image"][0]).name for r in rows[51:91]]
    train = load("medical_mri", tmp_path, split="train", limit=9, **options)
    assert not pixels(train) & pixels(test)
    (tmp_path / "published.json").write_text(json.dumps([rows[0] | {"question": "Other?"}]))
    with pytest.raises(DataError, match=r"published\.json, row 0: the pair .* is not in the data"):
        load("medical_mri", tmp_path, split="test", **options)


def test_medical_images_still_packed(tmp_path):
    medical_folder(tmp_path, ["medical_mri"], 20)
    with pytest.raises(DataError, match="only 17 pairs with distinct images, 300 needed"):
        load("medical_mri", tmp_path, split="test")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted((tmp_path / "images").iterdir()):
            archive.write(file, f"images/{file.name}")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match=r"no such file .*unpack the images: unzip -q"):
        load("medical_mri", tmp_path, split="test")
    with pytest.raises(DataError, match=r"holds neither .*\.json nor test\.jsonl"):
        load("medical_mri", tmp_path.parent, split="test")


@pytest.mark.parametrize("inside", ["images/", ""])
def test_medical_from_the_hub_unpacks_its_images(offline, inside):
    entry = medical.CATALOG["medical_mri"]
    folder = hub_cache(offline / "cache", entry.hub)
    medical_folder(folder, ["medical_mri"], 400)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in sorted((folder / "images").iterdir()):
            archive.write(file, f"{inside}{file.name}")
    shutil.rmtree(folder / "images")
    for _ in range(2):
        assert len(tasks.load_all([DataSource(task="medical_mri", split="test")])) == 300
    assert sorted(file.name for file in folder.iterdir()) == ["images", "images.zip", medical.BUNDLE]


def test_medical_in_our_form(tmp_path):
    row = {"problem": "What is seen?", "choices": ["Lung", "Liver"], "answer": "B"}
    jsonl(tmp_path, "test.jsonl", [row | {"images": [png_of(1)]}])
    assert contents(load("medical_xray", tmp_path))[0][:2] == ("What is seen?\n(A) Lung\n(B) Liver", "B")
