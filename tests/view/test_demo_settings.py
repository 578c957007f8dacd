"""What the demo shows, by its command line and by default; and that the packages are complete."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, TEXT

from mm_agrae.errors import ConfigError
from mm_agrae.view.demo_settings import DemoSettings, embedded_models, embedded_runs, settings_for
from mm_agrae.view.runs import RunLibrary


def test_settings_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    folder = run / "checkpoints" / "step_000003"
    shutil.copytree(TEXT, folder)
    other = tmp_path / "run2" / "run"
    shutil.copytree(TEXT, other)
    settings = settings_for([str(run), str(other), "someone/model"], port=1, share=False)
    assert settings.runs == (run, *embedded_runs())
    own = {k: v for k, v in settings.models.items() if k not in embedded_models()}
    assert own == {"run": str(other), "model": "someone/model"}  # an unfinished checkpoint: no
    (folder / "mm_agrae.json").write_text(json.dumps({"sha256": {}}))
    settings = settings_for([str(run), str(other)])
    # One's own come first, and the first is what the demo opens with.
    assert dict(settings.models) == {"run": str(folder), "run (2)": str(other)} | embedded_models()
    assert list(settings.models)[:2] == ["run", "run (2)"]
    assert RunLibrary(settings.runs).first() == "run"  # however new the embedded run's files are


def test_a_folder_of_runs_is_shown_whole_and_a_wrong_path_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("{}")
    settings = settings_for([str(tmp_path)])
    assert settings.runs == (tmp_path, *embedded_runs())
    assert dict(settings.models) == embedded_models()
    (tmp_path / "more" / "of" / "them").mkdir(parents=True)
    (tmp_path / "more" / "of" / "them" / "config.yaml").write_text("{}")
    assert settings_for([str(tmp_path / "more")]).runs[0] == tmp_path / "more"  # as deep as the demo looks
    for path in (str(tmp_path / "b"), "no such", "a/b/c", "../x"):
        with pytest.raises(ConfigError, match="not a run folder, a checkpoint or a model id"):
            settings_for([path])
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "config.yaml"):
        with pytest.raises(ConfigError, match="holds neither a run"):
            settings_for([str(path)])


def test_the_demo_is_private_by_default():
    settings = DemoSettings()
    assert settings.host == "127.0.0.1"
    assert not settings.share
    assert not settings.allow_model_paths
    assert settings.runs == embedded_runs()
    assert settings.models["base"] == str(ROOT / "data" / "warm_start" / "vl")


def test_every_package_is_shipped():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = [name for name in project["tool"]["setuptools"]["packages"] if "shipped" not in name]  # see test_wheel.py
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "mm_agrae").rglob("__init__.py")}
    assert sorted(listed) == sorted([*(".".join(f.parts) for f in folders), "mm_agrae_demo"])
    assert project["tool"]["setuptools"]["package-dir"]["mm_agrae_demo"] == "demo"
    assert Path(ROOT, "demo", "__init__.py").is_file()
