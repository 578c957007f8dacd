"""What the run folder keeps, and what it says when it cannot."""

import errno
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from helpers import ROOT, small_files
from PIL import Image

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.statistics import summarise
from mm_agrae.run.folder import ROWS_PER_GROUP, RunFolder
from mm_agrae.run.records import LATER_COLUMNS, RolloutRecord, SampleRecord

OLD_RUN = ROOT / "tests" / "run" / "version_0_1_0"
HOSTILE = ["\ud800", "a\0b", "\ud83d\ude00", "\r\n\x1b[31m", "<img src=x onerror=alert(1)>", "]]>", ""]
STORED = ["\ufffd", "a\0b", "😀", *HOSTILE[3:]]


def record(**changes):
    row = RolloutRecord(
        step=3,
        prompt_index=1,
        completion_index=2,
        example_id="e1",
        question="What is <image>?",
        prompt_text="<|im_start|>user",
        answer="4",
        completion="<think>2+2</think> \\boxed{4}",
        tokens=9,
        finish_reason="stop",
        reward=0.9,
        success=True,
        resample_round=1,
        images=("images/0.png",),
        parts={"accuracy": 1.0, "format": 0.0},
        error="",
        advantage_before=1.2,
        advantage_sample_level=0.8,
        advantage=0.4,
        entropy=0.25,
        meta={"family": "angles", "nested": {"x": [1, None, "é"]}},
    )
    return replace(row, **changes)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run").create("model: {path: m}\n", {"torch": "2"})


def no_leftovers(folder):
    return not [path for path in folder.path.rglob("*") if path.name.endswith(".part")]


# -- creating


def test_create_writes_config_and_versions_and_does_not_mix_runs(folder):
    assert folder.read_config() == "model: {path: m}\n"
    created = folder.read_versions()["created"]
    assert folder.read_versions() == {"created": created, "torch": "2"}
    with pytest.raises(RunFolderError, match="holds a run already"):
        folder.create("other: 1\n", {})
    assert folder.read_config() == "model: {path: m}\n"
    folder.create("other: 1\n", {"torch": "3"}, resume=True)
    assert folder.read_versions() == {"created": created, "torch": "3"}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("precious")
    for path in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(RunFolderError, match="a file stands in the way") as caught:
            RunFolder(path).create("", {})
        assert str(path) in str(caught.value)
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder root can't write")
def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(RunFolderError, match=r"run folder /sys/run.*choose another run_dir"):
        RunFolder("/sys/run").create("", {})


def test_a_read_only_folder_is_named(folder):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="read-only here: choose another run_dir"):
            folder.write_summary({})
    finally:
        folder.path.chmod(0o700)


def test_no_run_here(tmp_path):
    with pytest.raises(RunFolderError, match="no run here"):
        RunFolder(tmp_path).read_config()
    assert RunFolder(tmp_path).read_metrics() == []
    assert RunFolder(tmp_path).read_summary() == {}
    assert RunFolder(tmp_path).read_evaluations() == []
    assert RunFolder(tmp_path).rollout_steps() == []


# -- a disk that fills up


def test_full_disk_leaves_every_file_as_it_was(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rows = [record(completion=noise.tobytes().hex())]
    folder.write_summary({"a": 1})
    folder.write_rollouts(3, [record()])
    folder.append_metrics({"step": 1})
    writes = [
        lambda: folder.write_summary({"a": "x" * 9000}),
        lambda: folder.write_rollouts(3, rows),
        lambda: folder.append_metrics({"step": 2, "x": "y" * 9000}),
        lambda: folder.store_image(Image.fromarray(noise)),
        lambda: folder.write_evaluation(evaluation("before"), samples(500)),
    ]
    for write in writes:
        with small_files(8000), pytest.raises(RunFolderError, match=r"disk or quota is full.*free") as caught:
            write()
        assert str(folder.path) in str(caught.value)
    assert no_leftovers(folder)
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert folder.read_summary() == {"a": 1}
    assert folder.read_rollouts(3)[0]["completion"] == record().completion
    assert folder.read_metrics() == [{"step": 1}]
    assert folder.read_evaluations() == []
    for write in writes:  # and once there is room again, the same run goes on
        write()
    assert [row["step"] for row in folder.read_metrics()] == [1, 2]
    assert [result.name for result in folder.read_evaluations()] == ["before"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_no_space_left_is_named(folder):
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=os.strerror(errno.ENOSPC)):
        folder.append_metrics({"step": 1})


# -- metrics


def test_metrics_take_any_number_and_write_valid_json(folder):
    folder.append_metrics({"step": 1, "nan": math.nan, "inf": np.float32("inf"), "n": np.int64(3)})
    folder.append_metrics({"step": 2, "tensor": torch.tensor(0.5, requires_grad=True)})

    def refuse(name):
        raise AssertionError(name)

    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[0], parse_constant=refuse)
    assert found == {"step": 1, "nan": None, "inf": None, "n": 3}
    assert folder.read_metrics()[1] == {"step": 2, "tensor": 0.5}


def test_an_unfinished_last_line_is_left_out_and_then_removed(folder):
    folder.append_metrics({"step": 1})
    path = folder.path / "metrics.jsonl"
    for unfinished in (b'{"step": 2, "rew', b"\xff\xfe", b"3"):
        path.write_bytes(b'{"step": 1}\n' + unfinished)
        assert folder.read_metrics() == [{"step": 1}]
    folder.append_metrics({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2 is damaged"):
        folder.read_metrics()


def test_metrics_are_followed_from_a_mark(folder):
    assert folder.follow_metrics() == ([], None, True)
    folder.append_metrics({"step": 1})
    rows, mark, from_start = folder.follow_metrics()
    assert (rows, from_start) == ([{"step": 1}], True)
    assert folder.follow_metrics(mark) == ([], mark, False)
    for step in (2, 3):
        folder.append_metrics({"step": step})
        folder.write_rollouts(step, [record(step=step)])
    rows, later, from_start = folder.follow_metrics(mark)
    assert (rows, from_start) == ([{"step": 2}, {"step": 3}], False)
    folder.rewind(2)  # a resumed run drops later steps and rewrites the file
    assert folder.rollout_steps() == [2]
    rows, _, from_start = folder.follow_metrics(later)
    assert (rows, from_start) == ([{"step": 1}, {"step": 2}], True)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 3 is damaged"):
        folder.follow_metrics()


# -- rollouts


def test_rollouts_round_trip(folder):
    rows = [record(), record(completion_index=3, entropy=None, advantage=None, images=(), parts={})]
    folder.write_rollouts(3, rows)
    for row, found in zip(rows, folder.read_rollouts(3), strict=True):
        assert RolloutRecord(**(found | {"images": tuple(found["images"])})) == row
    assert folder.read_rollouts(3, ["reward", "parts"])[0] == {
        "reward": 0.9,
        "parts": {"accuracy": 1.0, "format": 0.0},
    }
    folder.write_rollouts(4, [])
    assert folder.read_rollouts(4) == []
    with pytest.raises(ValueError, match="rewards"):
        folder.read_rollouts(3, ["rewards"])
    with pytest.raises(RunFolderError, match="no rollouts of step 7; kept are 3 to 4"):
        folder.read_rollouts(7)
    (folder.path / "rollouts/step_000004.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RunFolderError, match=r"step_000004.parquet is damaged"):
        folder.read_rollouts(4)


@pytest.mark.parametrize(("text", "stored"), zip(HOSTILE, STORED, strict=True))
def test_rollouts_hold_any_text(folder, text, stored):
    names = ("example_id", "question", "prompt_text", "answer", "completion", "finish_reason")
    values = dict.fromkeys((*names, "error"), text)
    folder.write_rollouts(1, [record(**values, meta={text: [text]}, parts={text: math.nan}, reward=math.nan)])
    (row,) = folder.read_rollouts(1)
    assert {row[name] for name in values} == {stored}
    assert row["meta"] == {stored: [stored]}
    assert row["parts"] == {stored: None}
    assert math.isnan(row["reward"])


def test_a_large_step_is_read_by_column_and_without_the_others(folder):
    text = np.random.default_rng(0).bytes(40_000).hex()
    rows = [record(completion=text[i : i + 800], completion_index=i) for i in range(10_000)]
    folder.write_rollouts(1, rows)
    folder.write_rollouts(2, rows[:5])
    assert folder.rollout_steps() == [1, 2]
    (folder.path / "rollouts/step_000002.parquet").write_bytes(b"")
    found = folder.read_rollouts(1, ["completion_index"])
    assert [row["completion_index"] for row in found] == list(range(10_000))


def test_some_rows_of_a_step_and_all_of_them_in_parts(folder):
    count = 2 * ROWS_PER_GROUP + 7
    folder.write_rollouts(3, [record(completion_index=i, completion=f"c{i}") for i in range(count)])
    everything = folder.read_rollouts(3)
    wanted = [count - 1, 0, ROWS_PER_GROUP, 3, ROWS_PER_GROUP - 1, 3]
    assert folder.read_rollouts(3, rows=wanted) == [everything[row] for row in wanted]
    assert folder.read_rollouts(3, ["completion"], rows=[700]) == [{"completion": "c700"}]
    assert folder.read_rollouts(3, rows=[]) == []
    for missing in (-1, count):
        with pytest.raises(RunFolderError, match="open it again"):
            folder.read_rollouts(3, rows=[0, missing])
    parts = list(folder.iter_rollouts(3))
    assert max(map(len, parts)) <= ROWS_PER_GROUP
    assert [row for part in parts for row in part] == everything
    with pytest.raises(ValueError, match="no column"):
        list(folder.iter_rollouts(3, ["password"]))


def test_a_run_of_version_0_1_0_is_read_by_todays_names(tmp_path):
    old = RunFolder(OLD_RUN)
    assert '"completions/right"' in (OLD_RUN / "metrics.jsonl").read_text()
    first, step = old.read_metrics()[0], old.rollout_steps()[0]
    assert first["completions/correct"] == 49
    assert (first["groups/all_correct"], first["groups/all_incorrect"]) == (0.1875, 0.125)
    rows = old.read_rollouts(step)
    assert rows[0].keys() == {field.name for field in fields(RolloutRecord)} - LATER_COLUMNS
    assert {row["resample_round"] for row in rows} == {0}
    assert old.read_rollouts(step, ["resample_round"], rows=[1]) == [{"resample_round": 0}]
    (batch, *_) = old.iter_rollouts(step, ["resample_round", "reward"])
    assert batch[0] == {"resample_round": 0, "reward": rows[0]["reward"]}
    table = old.rollout_table([step], ["reward", "correction"])
    assert table["reward"].to_pylist() == [row["reward"] for row in rows]
    assert set(table["correction"].to_pylist()) == {None}

    # Once such a run is resumed, its file holds today's names alone.
    shutil.copytree(OLD_RUN, tmp_path / "resumed")
    resumed = RunFolder(tmp_path / "resumed")
    resumed.rewind(2)
    resumed.append_metrics({"step": 3, "completions/correct": 1.0})
    assert [row["step"] for row in resumed.read_metrics()] == [1, 2, 3]
    assert '"completions/right"' not in (resumed.path / "metrics.jsonl").read_text()


# -- images


def test_an_image_is_stored_once(folder):
    red = Image.new("RGB", (8, 6), "red")
    paths = {folder.store_image(red), folder.store_image(red.copy())}
    (path,) = paths
    stored = folder.path / path
    before = stored.stat().st_mtime_ns
    RunFolder(folder.path).store_image(red)  # another process has the same image
    assert stored.stat().st_mtime_ns == before
    assert len(list((folder.path / "images").iterdir())) == 1
    with Image.open(stored) as back:
        assert back.tobytes() == red.tobytes()
    assert folder.image_path(path) == stored.resolve()
    # The same bytes in another shape are another image.
    assert folder.store_image(Image.new("RGB", (6, 8), "red")) != path


def test_short_lived_images_are_not_mixed_up(folder):
    """Python reuses the ids of dead objects; the cache must notice."""
    for shade in range(60):
        path = folder.store_image(Image.new("L", (2, 2), shade))
        with Image.open(folder.path / path) as back:
            assert back.getpixel((0, 0)) == shade
    assert not folder._stored


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I;16", "F", "YCbCr", "HSV"])
def test_images_of_any_mode(folder, mode):
    with Image.open(folder.path / folder.store_image(Image.new(mode, (3, 3)))) as back:
        assert back.size == (3, 3)


def test_only_the_runs_own_images_are_found(folder, tmp_path):
    folder.store_image(Image.new("L", (2, 2)))
    (tmp_path / "secret.png").write_text("x")
    (folder.path / "images/link.png").symlink_to(tmp_path / "secret.png")
    for path in (
        "../secret.png",
        "images/../../secret.png",
        str(tmp_path / "secret.png"),
        "images/link.png",
        "config.yaml",
        "images",
        "images/none.png",
        "a\0b",
        "images/" + "x" * 5000,
    ):
        assert folder.image_path(path) is None, path


# -- evaluations and summary


def evaluation(name, label="figures"):
    correct = np.array([[1, 0], [0, 0], [1, 1]], dtype=bool)
    size = np.full((3, 2), 7)
    meta = [{}] * 3
    return summarise(name, label, correct, None, size, ~correct, None, meta, 1.0, 42, bootstrap=20)


def samples(count=4):
    for i in range(count):
        yield SampleRecord(f"e{i}", 0, "q", "a", "text \ud800" * 3, True, 3, "stop", meta={"level": i})


def test_evaluations_come_back_in_order_with_their_samples(folder):
    for name in ("after", "step_000050", "before", "step_000100"):
        folder.write_evaluation(evaluation(name), samples())
    folder.write_evaluation(evaluation("after", "angles/../x"), samples(2))
    folder.write_evaluation(evaluation("after"), samples(3))
    found = folder.read_evaluations()
    assert [result.name for result in found] == [*("before", "step_000050", "step_000100"), *("after", "after")]
    assert found[0] == evaluation("before")
    counts = {result.label: len(list(folder.read_samples(result))) for result in found[-2:]}
    assert counts == {"figures": 3, "angles/../x": 2}
    expected = asdict(next(samples())) | {"completion": "text \ufffd" * 3, "images": []}
    assert next(folder.read_samples(found[0])) == expected
    assert {path.parent for path in folder.path.rglob("result.json")} == {
        folder.path / "evaluations" / name
        for name in ("before", "step_000050", "step_000100", "after", "after@angles-..-x")
    }


def test_names_that_make_the_same_folder_are_kept_apart(folder):
    names = [(name, label) for name in ("a/b", "a-b") for label in ("x/y", "x-y", "\ud800")]
    for count, key in enumerate(names * 2):
        folder.write_evaluation(evaluation(*key), samples(count + 1))
    found = {(r.name, r.label): len(list(folder.read_samples(r))) for r in folder.read_evaluations()}
    stored = [(name, label.replace("\ud800", "\ufffd")) for name, label in names]
    assert found == dict(zip(stored, range(7, 13), strict=True))


def test_an_evaluation_cannot_leave_the_folder(folder):
    for name in ("../../escape", "..", ".", "", "/etc/x", "a\0b"):
        path = folder.write_evaluation(evaluation(name), samples(1))
        assert path.resolve().parent == (folder.path / "evaluations").resolve()
        assert path.name not in ("", ".", "..")


def test_damaged_files_are_named(folder):
    folder.write_evaluation(evaluation("before"), samples())
    (result,) = folder.read_evaluations()
    (folder.path / "evaluations/before/samples.jsonl").write_text('{"a": 1}\n{"b\n')
    with pytest.raises(RunFolderError, match=r"samples.jsonl line 2"):
        list(folder.read_samples(result))
    for text in ("{", "[]", "{}", '{"name": 1}'):
        (folder.path / "evaluations/before/result.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"before/result.json: damaged"):
            folder.read_evaluations()
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary.json: not valid JSON"):
        folder.read_summary()


def test_summary_round_trip(folder):
    folder.write_summary({"pass_at_k": {"before": {1: {"mean": 0.5}}}, "loss": math.inf})
    assert folder.read_summary() == {"pass_at_k": {"before": {"1": {"mean": 0.5}}}, "loss": None}
