"""What a run says of itself: the line of a step, and warnings, each in a run that was made to come there where one is
cheap, otherwise on the metrics of such a run."""

import json
import re
from pathlib import Path

import pytest
from helpers import TEXT, run_config

from mm_agrae import cli
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.step_line import ENTRIES, legend, step_line
from mm_agrae.run.warnings import GAP, SPAN, STEPS_ALIKE, STEPS_AT_ZERO, WARNINGS, Watch
from mm_agrae.trainer import Trainer

ROOT = Path(__file__).parents[2]
SOUND = {
    "reward/mean": 0.5, "reward/errors": 0.0, "success/mean": 0.5, "advantage/omega": 0.5, "groups/mixed": 0.5,
    "groups/all_correct": 0.2, "groups/no_signal": 0.5, "completions/mean_tokens": 30.0, "completions/truncated": 0.02,
    "policy/entropy": 0.5, "policy/clip_low": 0.01, "policy/clip_high": 0.01, "policy/ratio_max": 3.0,
    "mismatch/mean_abs": 0.01, "update/grad_norm": 0.3, "seconds/total": 1.25,
}  # fmt: skip
ZERO = {"groups/no_signal": 1.0, "update/grad_norm": 0.0}


def told(rows, watch=None):
    """(step, warning) of each line said."""
    watch, found = watch or Watch(), []
    for row in rows:
        found += [(row["step"], re.search(r"docs/warnings\.md#([\w-]+)\)$", line)[1]) for line in watch.add(row)]
    return found


def rows(*stretches, first=1):
    """Rows of (number of steps, what is not as in a sound run)."""
    changes = [change for count, change in stretches for _ in range(count)]
    return [SOUND | change | {"step": step} for step, change in enumerate(changes, first)]


def train(config):
    Trainer(config, Reporter()).train()


# ------------------------------------------------------------------- the states


@pytest.mark.parametrize(
    ("name", "after", "change"),
    [
        ("truncated", STEPS_AT_ZERO, {"completions/truncated": 0.97, "success/mean": 0.0} | ZERO),
        ("none-correct", STEPS_AT_ZERO, {"success/mean": 0.0} | ZERO),
        ("all-correct", STEPS_ALIKE, {"groups/all_correct": 1.0, "success/mean": 1.0} | ZERO),
        ("no-gradient", STEPS_ALIKE, {"groups/no_signal": 1.0}),
        ("no-gradient", STEPS_ALIKE, {"update/grad_norm": 0.0}),
        ("variants", STEPS_AT_ZERO, {"variants/share": 0.0}),
        ("entropy", SPAN, {"policy/entropy": 0.04}),
        ("clipping", STEPS_ALIKE, {"policy/clip_low": 0.07, "policy/clip_high": 0.07}),
        ("mismatch", SPAN, {"mismatch/mean_abs": 0.04}),
    ],
)
def test_each_state_is_told_once_and_kept(name, after, change):
    watch = Watch()
    assert told(rows((SPAN, {}), (40, change)), watch) == [(SPAN + after, name)]
    assert watch.spans == {name: [[SPAN + after, SPAN + 40]]}


@pytest.mark.parametrize(
    "change",
    [
        {"completions/truncated": 0.85},
        {"success/mean": 0.001},
        {"groups/all_correct": 0.85},
        {"policy/entropy": 0.06},
        {"policy/entropy": 0.04, "success/mean": 0.95},  # solved
        {"policy/clip_low": 0.4, "policy/clip_high": 0.3, "policy/ratio_max": 1.01},  # gspo
        {"policy/clip_low": 0.04, "policy/clip_high": 0.04},
        {"mismatch/mean_abs": 0.025},
        dict.fromkeys(SOUND),  # null in metrics.jsonl: nothing is known
    ],
)  # fmt: skip
def test_short_of_a_state_nothing_is_told(change):
    assert told(rows((SPAN, {}), (40, change))) == []
    assert told([{"step": row["step"]} for row in rows((40, {}))]) == []


def test_growth_from_a_tiny_mismatch_does_not_matter():
    assert told(rows((SPAN, {"mismatch/mean_abs": 0.001}), (40, {"mismatch/mean_abs": 0.015}))) == []


def test_a_state_that_ends_and_comes_back_is_told_again():
    wrong, watch = {"success/mean": 0.0}, Watch()  # held at step 5, and again at the third step without an answer
    assert told(rows((5, wrong), (GAP - 3, {}), (5, wrong))) == [(3, "none-correct")]
    assert told(rows((5, wrong), (GAP - 2, {}), (5, wrong)), watch) == [(3, "none-correct"), (GAP + 6, "none-correct")]
    assert watch.spans == {"none-correct": [[3, 5], [GAP + 6, GAP + 8]]}


def test_a_resumed_run_tells_once_more_what_still_holds():
    all_ = rows((SPAN, {}), (20, {"policy/entropy": 0.01, "success/mean": 0.0}), (5, {}))
    for cut, held in ((SPAN + 15, ["none-correct", "entropy"]), (SPAN + 22, [])):
        watch = Watch(all_[:cut])
        assert told(all_[cut:], watch) == [(cut + 1, name) for name in held]
        assert watch.spans == Watch(all_).spans


def test_a_sound_run_is_told_nothing():
    found = RunFolder(ROOT / "data" / "example_run").read_metrics()
    assert len(found) > 100
    assert told(found) == []


# ------------------------------------------------------------------- runs that come there

CONSTANT = "def constant(example, completion): return 1.0\n"


@pytest.mark.parametrize(
    ("name", "step", "sections"),
    [
        ("truncated", STEPS_AT_ZERO, {"rollout": {"max_new_tokens": 2}}),
        ("no-gradient", STEPS_ALIKE, {"reward": {"parts": {"accuracy": 0.0, "own": 1.0}}}),
        ("all-correct", STEPS_ALIKE, {"reward": {"parts": {"own": 1.0}, "success": "own"}}),
        ("variants", STEPS_AT_ZERO, {"rollout": {"variants": {}}}),
    ],
)
def test_a_run_says_what_is_wrong_with_it(tmp_path, capsys, name, step, sections):
    (tmp_path / "own.py").write_text(CONSTANT)
    own = f"{tmp_path / 'own.py'}:constant"
    sections = json.loads(json.dumps(sections).replace('"own"', json.dumps(own)))
    sections["rollout"] = {"max_new_tokens": 64, "prompts_per_step": 8} | sections.get("rollout", {})
    off = {"before": False, "after": False}
    steps = {"train": {"steps": step + 2}, "evaluate": off, "checkpoint": {"every": step + 1, "keep": 9}}
    train(run_config(tmp_path / "run", TEXT, **sections, **steps))
    lines = capsys.readouterr().out.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert warned == [f"warning: {WARNINGS[name][1]} (docs/warnings.md#{name})"]
    assert lines[lines.index(warned[0]) - 1].startswith(f"step {step}/{step + 2}  ")
    assert f"truncated {'100%' if name == 'truncated' else '  0%'}" in lines[lines.index(warned[0]) - 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["warnings"] == {name: [[step, step + 2]]}
    if name == "truncated":  # taken up again one step before its end, in a new terminal perhaps
        resume = str(tmp_path / "run" / "checkpoints" / f"step_{step + 1:06d}")
        train(run_config(tmp_path / "run", TEXT, **sections, **steps).model_copy(update={"resume": resume}))
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")] == warned
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == summary["warnings"]


# ------------------------------------------------------------------- the line, its legend, the pages


def test_the_line_of_a_step():
    line = step_line(SOUND, 7, 150)
    assert line == (
        "step   7/150  reward 0.500  correct  50.0%  ω 0.50  mixed  50%  entropy 0.500  tokens 30  truncated   2%  "
        "|g| 0.30  time 1.2 s"
    )
    more = step_line(SOUND | {"reward/errors": 3.0, "memory/peak_gpu_mb": 10240.0}, 7, 150)
    assert more == f"{line}  GPU 10.0 GiB  reward errors 3"
    assert list(ENTRIES) == [re.match(r"  (.*?)  ", text + "  ")[1] for text in legend().splitlines()[1:]]


def test_the_legend_is_in_the_help_and_the_documentation(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert legend() in capsys.readouterr().out
    page = (ROOT / "docs" / "reading_a_run.md").read_text("utf-8")
    section = page.split("## The line of a step")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ((?:\\.|[^|\n])+) \|", section, re.MULTILINE)
    assert [name.replace("\\", "") for name in rows] == list(ENTRIES)


def test_every_warning_has_its_section():
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "warnings.md").read_text("utf-8"), re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    assert anchors[: len(WARNINGS)] == list(WARNINGS)
    source = "".join(path.read_text("utf-8") for path in (ROOT / "mm_agrae").rglob("*.py"))
    named = set(re.findall(r"docs/warnings\.md#([\w-]+)", source))
    assert named == {"mismatch", "gold-answers"}
    assert named <= set(anchors)
