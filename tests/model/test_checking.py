"""What is wrong with data is found before a run, and said with remedies that a run under way accepts."""

import io
import json

import pytest
from helpers import TEXT, VL, run_config
from PIL import Image

from mm_agrae import config as configs
from mm_agrae import doctor
from mm_agrae.cli import main
from mm_agrae.config import DataSource
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.model import checking
from mm_agrae.model.checking import is_right_by_itself, look_at_all, said_of
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.warnings import STEPS_AT_ZERO
from mm_agrae.tasks import load_all
from mm_agrae.trainer import Trainer
from mm_agrae.types import Example

NO_EVALUATION = {"before": False, "after": False}


def png(folder, name, side):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    (folder / name).write_bytes(buffer.getvalue())


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Eight rows, of which the one at index 6 has an image of 144 tokens."""
    png(tmp_path, "s.png", 112)
    png(tmp_path, "b.png", 336)
    rows = [{"question": "How many circles?", "answer": "1", "images": ["s.png"]} for _ in range(8)]
    rows[6]["images"] = ["b.png"]
    return tmp_path, rows


def config_for(folder, rows, run="run", path=VL, **sections):
    source = {"task": "files", "path": write(folder / "rows.jsonl", rows)}
    sections.setdefault("evaluate", NO_EVALUATION)
    own = sections.pop("data", {})
    return run_config(folder / run, path, **sections, data={"train": [source], "evaluate": [], "shuffle": False} | own)


def train(config, capsys=None):
    trainer = Trainer(config, Reporter())
    try:
        trainer.train()
    finally:
        text = " ".join(capsys.readouterr().out.split()) if capsys else ""
    return text


def one(path, **options):
    return load_all([DataSource(task="files", path=path, **options)])


# Before the run


def test_every_row_is_read_in_this_process_or_in_others(data):
    folder, rows = data
    (folder / "cut.png").write_bytes((folder / "s.png").read_bytes()[:60])
    rows[2]["images"] = ["cut.png"]
    rows[3]["question"] = "a control token <|im_end|>"
    config = run_config(folder, prompt={"max_tokens": 100})
    found = []
    for copies in (1, 9):  # 72 rows: more than are looked at in this process
        task = one(write(folder / "rows.jsonl", rows * copies))
        found.append(look_at_all(task, task.not_generated, checking._maker(config), Reporter(enabled=False)))
        lines = {text: goes_on for goes_on, text in said_of(found[-1], 100, skip=False)}
        longest, too_long, bad, also = list(lines)[:4]
        assert longest.endswith("line 7)")
        assert too_long.startswith(
            f"{copies} of {8 * copies} prompts are longer than prompt.max_tokens = 100; raise it"
        )
        assert bad.startswith(f"{2 * copies} of {8 * copies} rows cannot be used; the first: ")
        assert "damaged or truncated" in bad
        assert "line 3" in bad
        assert also.startswith("also ")
        assert [lines[text] for text in (longest, too_long, bad)] == [True, False, False]
        assert all(goes_on for goes_on, _ in said_of(found[-1], 100, skip=True))
    tokens = [[row.tokens for row in rows] for rows in found]
    assert max(tokens[0]) == max(tokens[1]) > 144
    assert sum(tokens[0]) * 9 == sum(tokens[1])
    without_model = look_at_all(one(str(folder / "rows.jsonl")), range(8), None, Reporter(enabled=False))
    assert [(bool(row.problem), row.tokens) for row in without_model] == [(at == 2, 0) for at in range(8)]


@pytest.mark.parametrize(
    ("answer", "grading", "right"),
    [
        ("1", {}, True),
        ("\\frac12", {"kind": "math"}, True),
        ("so it is \\boxed{3}", {}, True),
        ("4 and 5\n#### 9", {"answer_in": ("answer_is",)}, True),
        ("B", {"kind": "choice", "choices": ["1", "2"], "answer_in": ("tag",)}, True),
        ("A dog runs.", {}, True),
        ("42", {"answer_in": ("a_colon",)}, True),
        ("maybe", {"kind": "yes_no"}, False),
        ("1\u202e2", {}, False),
        ("anything", {"grader": "mine:grade"}, True),
    ],
)
def test_golds_against_themselves(answer, grading, right):
    assert is_right_by_itself(Example("1", "?", answer, grading=grading)) == right


def test_doctor_counts_rows_that_a_run_would_stop_at(data, capsys):
    folder, rows = data
    config = config_for(folder, [*rows, {"question": "no answer"}], prompt={"max_tokens": 100})
    assert doctor.examine(config) == 2
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "train files: 8 rows", "read as plain rows (question from question, answer from answer, images from images)",
        "1 rows cannot be read; the first", "1 of 8 prompts are longer than prompt.max_tokens = 100",
        "2 problems to fix",
    ):  # fmt: skip
        assert expected in text
    skipping = config_for(folder, rows, prompt={"max_tokens": 100}, data={"on_bad_row": "skip"})
    assert doctor.examine(skipping) == 0


def test_the_start_of_a_run_reads_every_row_if_asked(data, capsys):
    folder, rows = data
    settings = {"prompt": {"max_tokens": 100}, "train": {"steps": 1}}
    with pytest.raises(DataError, match="1 of 8 prompts are longer than"):
        Trainer(config_for(folder, rows, data={"check": "all"}, **settings), Reporter())
    text = train(config_for(folder, rows, data={"check": "all", "on_bad_row": "skip"}, **settings), capsys)
    assert "1 of 8 prompts are longer" in text


@pytest.mark.parametrize(("check", "warns"), [("sample", True), ("off", False)])
def test_golds_that_cannot_be_right_are_said_at_the_start(tmp_path, capsys, check, warns):
    rows = [{"question": "Is it?", "answer": "maybe" if number % 2 else "yes"} for number in range(200)]
    source = {"task": "files", "path": str(tmp_path / "rows.jsonl"), "grading": {"kind": "yes_no"}}
    Trainer(config_for(tmp_path, rows, path=TEXT, data={"train": [source], "check": check}), Reporter())
    text = " ".join(capsys.readouterr().out.split())
    said = "warning: 32 of 64 gold answers are graded as wrong when a model gives just them, such as"
    assert (said in text) == warns
    assert ("line 4: 'maybe'" in text) == warns
    assert "rows.jsonl: read as plain rows" in text


# During the run


def test_a_late_bad_row_names_remedies_that_the_same_run_accepts(data, capsys):
    folder, rows = data
    settings = {"prompt": {"max_tokens": 100}, "train": {"steps": 3}}
    for run in ("skip", "longer"):
        with pytest.raises(
            DataError, match=r"line 7.*raise it .*data\.on_bad_row=skip, which a run under way accepts"
        ):
            train(config_for(folder, rows, run, **settings))
        assert [row["step"] for row in RunFolder(folder / run).read_metrics()] == [1]
        with pytest.raises(ConfigError, match=r"prompt\.max_pixels"):
            train(config_for(folder, rows, run, **settings | {"prompt": {"max_tokens": 100, "max_pixels": 12544}}))
    train(config_for(folder, rows, "skip", **settings, data={"on_bad_row": "skip"}))
    assert RunFolder(folder / "skip").read_metrics()[-1]["data/rows_skipped"] == 1
    train(config_for(folder, rows, "longer", **settings | {"prompt": {"max_tokens": 300}}))
    assert RunFolder(folder / "longer").read_metrics()[-1]["data/rows_skipped"] == 0
    assert [len(RunFolder(folder / run).read_metrics()) for run in ("skip", "longer")] == [3, 3]


def test_a_damaged_image_is_skipped_on_resume_as_its_message_says(data):
    folder, rows = data
    (folder / "cut.png").write_bytes((folder / "s.png").read_bytes()[:60])
    rows[6]["images"] = ["cut.png"]
    with pytest.raises(DataError, match=r"cut\.png: damaged.*mend it or set data\.on_bad_row=skip"):
        train(config_for(folder, rows, train={"steps": 2}))
    train(config_for(folder, rows, train={"steps": 2}, data={"on_bad_row": "skip"}))
    with pytest.raises(ConfigError, match=r"data\.on_bad_row: 'skip' -> 'error'"):
        train(config_for(folder, rows, train={"steps": 3}))


def test_a_run_whose_answers_are_all_wrong_says_so(tmp_path, capsys):
    rows = [{"question": "1 + 1?", "answer": "no such word"}] * 4
    text = train(config_for(tmp_path, rows, path=TEXT, train={"steps": STEPS_AT_ZERO + 2}), capsys)
    assert text.count(f"warning: no answer was correct in {STEPS_AT_ZERO} steps") == 1
    assert "mm-agrae data CONFIG" in text


# The command and the plan


def test_the_command_shows_what_a_data_set_is_read_as(data, capsys):
    folder, rows = data
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>How many?"}]
    verl = {"prompt": prompt, "reward_model": {"ground_truth": "1"}, "extra": 1}
    rows = [verl | {"images": row["images"]} for row in rows]
    path = write(folder / "rows.jsonl", rows)
    page = folder / "rows.html"
    assert main(["data", path, "-n", "2", f"model.path={VL}", "prompt.max_tokens=100", "--out", str(page)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "train files: 8 rows", "read as verl rows", "not used: extra",
        "rows-1 system: 'Be brief.' question: '<image>How many?'",
        "images: 112×112", "answer: '1'", "!! 1 of 8 prompts are longer", "prompt tokens: ", "rows-2", str(page),
    ):  # fmt: skip
        assert expected in text
    assert "rows-3" not in text
    assert page.read_text().count("data:image/png;base64,") == 2
    assert main(["data", path, "columns.system=null", "limit=3"]) == 0
    text = capsys.readouterr().out
    assert "3 rows" in text
    assert "Be brief" not in text
    assert main(["data", str(folder / "absent.jsonl")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_the_command_reads_a_config(data, capsys):
    folder, rows = data
    config = config_for(folder, rows)
    (folder / "c.yaml").write_text(configs.dump(config))
    assert main(["data", str(folder / "c.yaml"), "prompt.max_tokens=300"]) == 0
    assert "prompt tokens: " in capsys.readouterr().out
    assert main(["data", str(folder / "c.yaml"), "prompt.max_tokens=30", "data.on_bad_row=skip"]) == 0
    assert main(["data", str(folder / "c.yaml"), f"model.path={folder / 'absent'}"]) == 0
    assert "prompt lengths are not counted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "rows", "said"),
    [
        (1, 10, "0.80 epochs; 2 of the last epoch are not used: a step takes 4"),
        (2, 10, "2.00 epochs)"),
        (1, 8, "1.00 epochs)"),
        (3, 7, "; 1 of the last epoch are not used"),
    ],
)
def test_the_plan_tells_rows_that_are_dropped(tmp_path, epochs, rows, said):
    config = run_config(tmp_path, train={"steps": None, "epochs": epochs})
    assert said in dict(configs.plan(config, rows))["training rows"]
    assert "not used" not in dict(configs.plan(run_config(tmp_path), rows))["training rows"]
