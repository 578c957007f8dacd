"""Tasks by name: options are checked before any data is read."""

import re

import pytest
from data_files import write
from helpers import ROOT

from mm_agrae import config, tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import ConfigError


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
        tasks.load_all([source])


def test_unknown_tasks():
    with pytest.raises(ConfigError, match="no task 'file'; did you mean 'files'"):
        tasks.check(DataSource(task="file"))
    for name in ("no_such_module:Task", "mm_agrae.tasks.files:NoTask"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            tasks.check(DataSource(task=name))


def test_check_reads_no_data():
    tasks.check(DataSource(task="files", path="/no/such/file.jsonl", columns={"answer": "a"}))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_named_task_exists_and_is_described(name):
    first, *options = tasks.describe(name).splitlines()
    assert first == name
    assert re.fullmatch(r"  \w+: .+", options[0])


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
    files = {
        "task": "files",
        "path": write(
            tmp_path / "x.jsonl", [b"bad", *({"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5))]
        ),
    }
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
