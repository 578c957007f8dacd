import gzip
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import evaluate, make_run, metrics, rollouts, train

from mm_agrae.errors import RunFolderError
from mm_agrae.run.folder import ROWS_PER_GROUP, RunFolder
from mm_agrae.view.runs import FILTERS, ORDERS, RunLibrary, RunReader, find_runs, select


def opened(run):
    reader = RunReader(run.path)
    reader.refresh()
    return reader


# -- groups


def test_groups_of_a_step_and_their_texts(tmp_path):
    run = make_run(tmp_path / "run", [1, 2], groups=7, size=4)
    reader = opened(run)
    assert reader.steps == [1, 2]
    groups = reader.groups(2)
    assert [group.correct for group in groups] == [0, 1, 2, 3, 4, 0, 1]
    assert [group.kind for group in groups][:5] == ["all incorrect", *["mixed"] * 3, "all correct"]
    assert [group.strongest for group in groups] == [0.0, 0.75, 1.5, 2.25, 3.0, 0.0, 0.75]
    (second, first) = reader.rows(2, [groups[6], groups[1]])
    assert [row["completion_index"] for row in first] == [0, 1, 2, 3]
    assert first[3]["completion"] == "<think>so it is 2.1.3</think> \\boxed{3}"
    assert {row["prompt_index"] for row in second} == {6}


def test_resample_rounds_of_one_prompt_index_are_separate_groups(tmp_path):
    run = make_run(tmp_path / "run")
    rows = rollouts(run, 1, groups=1) + rollouts(run, 1, groups=1, resample_round={(0, i): 1 for i in range(4)})
    run.write_rollouts(1, rows)
    assert [group.rows for group in opened(run).groups(1)] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_filters_and_orders(tmp_path):
    run = make_run(
        tmp_path / "run",
        [1],
        groups=6,
        finish_reason={(1, 2): "length"},
        error={(2, 0): "accuracy: timed out after 1 s", (3, 0): "accuracy: ValueError"},
    )
    groups = opened(run).groups(1)
    shown = {name: [groups.index(group) for group in select(groups, name)] for name in FILTERS}
    assert shown == {
        "all": [0, 1, 2, 3, 4, 5],
        "mixed": [1, 2, 3],
        "all incorrect": [0, 5],
        "all correct": [4],
        "truncated": [1],
        "verifier timed out": [2],
        "verifier failed": [2, 3],
    }
    strongest = [groups.index(group) for group in select(groups, "all", "highest |A| first")]
    assert strongest == [4, 3, 2, 1, 0, 5]
    for order in ORDERS:
        assert Counter(select(groups, "all", order)) == Counter(groups)
    best = select(groups, "all", "highest reward first")
    worst = select(groups, "all", "lowest reward first")
    assert best[0].reward == 1.0
    assert worst[0].reward == 0.0


def test_search_finds_completions_questions_answers_and_ids_in_any_case(tmp_path):
    count = ROWS_PER_GROUP + 40  # more than one row group
    run = make_run(tmp_path / "run")
    run.write_rollouts(1, rollouts(run, 1, groups=count, size=1, completion={(count - 1, 0): "ÉCOLE"}))
    reader = opened(run)
    assert reader.search(1, "école") == {count - 1}
    assert reader.search(1, "gold 3") >= {3, 30, 39}
    assert reader.search(1, f"question {count - 2}?") == {count - 2}
    assert reader.search(1, f"EXAMPLE {count - 2}") == {count - 2}
    assert reader.search(1, "(") == set()
    assert reader.search(1, ".*") == set()


def test_only_the_row_groups_asked_for_are_read(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    run.write_rollouts(1, rollouts(run, 1, groups=3 * ROWS_PER_GROUP // 4 + 3, size=4))
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, index, **kw: read.append(index) or original(self, index, **kw)
    )
    reader = opened(run)
    groups = reader.groups(1)
    (rows,) = reader.rows(1, [groups[-1]])
    assert read == [3]
    assert rows[0]["question"] == f"<image> Question {len(groups) - 1}?"


# -- a run that goes on


def test_a_run_is_followed_without_reading_anything_twice(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    reader = RunReader(run.path)
    stamp = reader.refresh()
    assert (reader.metrics, reader.steps) == ([], [])
    assert reader.refresh() == stamp
    assert reader.progress() == "No step has been logged yet."
    train(run, [1, 2])
    assert reader.refresh() != stamp
    assert [row["step"] for row in reader.metrics] == [1, 2]
    read = []
    original = RunFolder._parse_metrics
    monkeypatch.setattr(
        RunFolder, "_parse_metrics", lambda self, lines, before: read.extend(lines) or original(self, lines, before)
    )
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # half a line: the run is writing it
    reader.refresh()
    assert [row["step"] for row in reader.metrics] == [1, 2]
    run.append_metrics(metrics(3))  # cuts the torn line off
    reader.refresh()
    assert reader.metrics == run.read_metrics()
    assert len(reader.metrics) == 3
    assert [line[:10] for line in read[:1]] == [b'{"step": 3']
    assert reader.progress() == "Not finished: 3 of 40 steps so far."
    before = reader.refresh()
    run.write_summary({"steps": 3})
    assert reader.refresh() != before
    assert reader.progress() == "Finished after 3 steps."


def test_a_resumed_run_takes_steps_back(tmp_path):
    run = make_run(tmp_path / "run", [1, 2, 3, 4])
    reader = opened(run)
    groups = reader.groups(3)
    run.rewind(2)
    train(run, [3], groups=2)
    reader.refresh()
    assert [row["step"] for row in reader.metrics] == [1, 2, 3]
    assert reader.steps == [1, 2, 3]
    assert len(groups) == 4
    assert len(reader.groups(3)) == 2  # rewritten, so not the groups remembered
    with pytest.raises(RunFolderError, match="has been rewritten"):
        reader.rows(3, groups)


def test_nearest_step_and_stride(tmp_path):
    run = make_run(tmp_path / "run")
    reader = opened(run)
    assert reader.nearest(3) is None
    assert reader.stride == 1
    train(run, [10, 30, 40], groups=1)
    reader.refresh()
    assert reader.stride == 10
    assert [reader.nearest(step) for step in (-5, 10, 19, 22, 36, 1e9)] == [10, 10, 10, 30, 40, 40]


# -- damage


def damaged(run, kind):
    path = run.path / "rollouts" / "step_000002.parquet"
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "overwritten":  # the pages, not the footer
        path.write_bytes(content[:4] + b"\xff" * 1500 + content[1504:])
    elif kind == "text":
        path.write_text("step,reward\n")
    elif kind == "other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind == "gone":
        path.unlink()


@pytest.mark.parametrize("kind", ["empty", "cut", "overwritten", "text", "other columns", "gone"])
def test_a_damaged_step_is_named_and_the_others_stay(tmp_path, kind):
    run = make_run(tmp_path / "run", [1, 2])
    reader = opened(run)
    damaged(run, kind)
    with pytest.raises(RunFolderError, match=r"damaged|no rollouts of step 2") as caught:
        reader.groups(2)
    assert str(run.path) in str(caught.value)
    with pytest.raises(RunFolderError):
        reader.search(2, "x")
    assert len(reader.groups(1)) == 4


def test_damaged_metrics_are_named(tmp_path):
    run = make_run(tmp_path / "run", [1, 2])
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 1', "{step"))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 1 is damaged"):
        opened(run)


# -- which runs there are


def test_runs_are_found_in_folders_and_named_apart(tmp_path):
    for name in ("a/run", "b/run", "c"):
        make_run(tmp_path / name)
    (tmp_path / "d").mkdir()
    assert find_runs([tmp_path / "c"]) == {"c": (tmp_path / "c").resolve()}
    found = find_runs([tmp_path, tmp_path / "c", tmp_path / "nothing"])
    assert set(found) == {"a/run", "b/run", f"{tmp_path.name}/c"}
    assert find_runs([tmp_path / "d"]) == {}


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    make_run(tmp_path / "secret", [1])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    make_run(tmp_path / "runs" / "own")
    assert set(find_runs([tmp_path / "runs"])) == {"own"}


@pytest.mark.parametrize("name", ["secret", "../secret", "/etc", "run/../../secret", "", ".", "run\0", None, "run/"])
def test_a_library_opens_nothing_but_its_runs(tmp_path, name):
    make_run(tmp_path / "secret", [1])
    library = RunLibrary([make_run(tmp_path / "given" / "run").path])
    with pytest.raises(RunFolderError, match="no such run"):
        library.open(name)
    assert library.open("run") is library.open("run")


def test_a_library_begins_with_the_run_trained_last(tmp_path):
    assert RunLibrary([]).first() is None
    make_run(tmp_path / "a")
    assert RunLibrary([tmp_path]).first() == "a"
    for age, name in enumerate("cbd"):
        run = make_run(tmp_path / name, [1])
        os.utime(run.path / "metrics.jsonl", (1e9 - age, 1e9 - age))
    assert RunLibrary([tmp_path]).first() == "c"


@pytest.mark.parametrize("step", [-1, 10**30, 0])
def test_steps_that_do_not_exist(tmp_path, step):
    run = make_run(tmp_path / "run", [1])
    with pytest.raises(RunFolderError, match="no rollouts of step"):
        opened(run).groups(step)


def test_images_are_only_those_of_the_run(tmp_path):
    run = make_run(tmp_path / "run", [1])
    (tmp_path / "secret.png").write_bytes(next((run.path / "images").iterdir()).read_bytes())
    (run.path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    for path in ("../secret.png", "images/../../secret.png", "images/link.png", "config.yaml",
                 str(tmp_path / "secret.png"), "images", "images/\0.png", "x" * 5000):  # fmt: skip
        assert run.image_path(path) is None, path


# -- size


MEASURE = """
import sys
from pathlib import Path
import pyarrow as pa
from mm_agrae.view.runs import RunReader, select

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

reader = RunReader(sys.argv[1])
reader.refresh()
first, *others = reader.steps
for step in (first, first):  # the libraries have allocated what they need after this
    reader.rows(step, select(reader.groups(step), "mixed", "highest |A| first")[:8])
    reader.search(step, "nowhere")
start, peak = resident(), 0
for step in others:
    reader.rows(step, select(reader.groups(step), "mixed", "highest |A| first")[:8])
    reader.search(step, "nowhere")
    peak = max(peak, resident())
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    run = make_run(tmp_path / "run")
    generator = random.Random(0)
    words = [f"{generator.getrandbits(64):x}" for _ in range(5000)]
    for step in range(1, 13):
        records = rollouts(run, step, groups=128, size=8, text=" ".join(generator.choices(words, k=250)))
        run.write_rollouts(step, records)
        run.append_metrics(metrics(step))
    texts = 11 * 1024 * 250 * 17  # bytes of text in the steps walked through: 48 MB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run.path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    grown = int(done.stdout)
    assert grown < texts / 3, f"{grown / 1e6:.0f} MB more after 11 steps of {texts / 11e6:.1f} MB"


def test_packed_samples_are_read_too(tmp_path):
    run = make_run(tmp_path / "run")
    evaluate(run, "after", [1, 2])
    (result,) = run.read_evaluations()
    plain = list(run.read_samples(result))
    path = run.samples_path(result)
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    assert list(run.read_samples(result)) == plain
    packed = run.samples_path(result)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match="damaged"):
        list(run.read_samples(result))
