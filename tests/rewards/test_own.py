"""Reward functions as other trainers' users have them, and what is said of those that do not work."""

import json

import pytest
from PIL import Image

from mm_agrae import cli
from mm_agrae.config import RewardSection
from mm_agrae.errors import ConfigError, RewardError
from mm_agrae.rewards import Rewarder
from mm_agrae.tasks.files import FileTask
from mm_agrae.types import Completion, Example

OWN = """
import functools, json

def texts(completions, **kwargs):
    return [float(text.startswith("s")) for text in completions]

def messages(prompts, completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    assert [prompt[-1]["content"] for prompt in prompts] == ["?"] * len(prompts)
    return [1.0 if content == gold else 0.0 for content, gold in zip(contents, solution)]

def columns(completions, completion_ids, level, *, ways=None):
    return [float((ids, lv, w) == ([1, 1, 1], 3, "w")) for ids, lv, w in zip(completion_ids, level, ways)]

def relative(completions, **kwargs):
    return [len(text) - sum(map(len, completions)) / len(completions) for text in completions]

def sometimes(completions, solution, **kwargs):
    return [None if text == "none" else 1.0 for text in completions]

async def later(completions, **kwargs):
    return [1.0] * len(completions)

def fragile(completions, **kwargs):
    return [1.0 / len(text) for text in completions]

def short(completions, **kwargs):
    return [1.0] * (len(completions) + 1)

def absent(completions, no_such_column, **kwargs):
    return [1.0] * len(completions)

def scaled(example, completion, factor, power=1):
    return factor * len(completion.text) ** power

def overlap(completions, answer, image_sizes, shown_sizes, images, **kwargs):
    found = []
    for text, gold, stored, shown, pictures in zip(completions, answer, image_sizes, shown_sizes, images):
        assert pictures[0].size == stored[0] and pictures[0].mode == "RGB"
        scale = stored[0][0] / shown[0][0]
        found.append(float([round(scale * edge) for edge in json.loads(text)] == gold))
    return found

def sees(example, completion, images):
    return float(images[0].size == example.image_sizes[0] == (100, 70) and example.shown_sizes == ((50, 35),))

class Length:
    def __init__(self, weight=2.0): self.weight = weight
    def __call__(self, example, completion): return self.weight * len(completion.text)

class ListLength(Length):
    def __call__(self, completions, **kwargs): return [self.weight * len(text) for text in completions]

class Needy:
    def __init__(self, model): pass
    def __call__(self, example, completion): return 1.0

triple = functools.partial(scaled, factor=3)
thrice = Length(3.0)
named = functools.partial(messages, extra=1)

def one(completion): return 1.0
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def annotated(predict: str, ground_truth: str): return 1.0
def positional(completions, /): return [1.0]
number = 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


def example(**columns):
    columns = {"solution": "so", "level": 3} | columns
    return Example("e1", "?", "5", columns=columns, meta={"ways": "w"}, origin="rows.jsonl, line 7")


def completion(text):
    return Completion((1,) * 3, (-0.5,) * 3, text, "stop", 0)


def values(path, name, texts, *examples, stop=False, **settings):
    """The values of one function of the file for some completions of the first example, then one of each other."""
    part = f"{path}:{name}"
    examples = examples or (example(),)
    given = [examples[0]] * (len(texts) - len(examples) + 1) + list(examples[1:])
    with Rewarder(RewardSection(parts={"accuracy": 0.0, part: 1.0}, **settings), 16) as rewarder:
        scores = rewarder.score(given, list(map(completion, texts)), stop)
    return [score.error or score.parts.get(part) for score in scores]


CHAT = {"prompt": [{"role": "user", "content": "?"}]}


@pytest.mark.parametrize(
    ("name", "texts", "columns", "expected"),
    [
        ("texts", ["so", "no"], {}, [1.0, 0.0]),
        ("messages", ["so", "no"], {}, [1.0, 0.0]),  # of text: it takes messages alone
        ("messages", ["so", "no"], CHAT, [1.0, 0.0]),
        ("texts", ["so", "no"], CHAT, [1.0, 0.0]),
        ("columns", ["so", "no"], {}, [1.0, 1.0]),
        ("columns", ["so", "no"], {"level": 4}, [0.0, 0.0]),
        ("relative", ["abc", "a"], {}, [1.0, -1.0]),  # one call sees all completions of a prompt
        ("sometimes", ["none", "so"], {}, [None, 1.0]),
        ("later", ["so"], {}, [1.0]),
        ("Length", ["abc"], {}, [6.0]),
        ("ListLength", ["abc", "a"], {}, [6.0, 2.0]),
        ("triple", ["abc"], {}, [9.0]),
        ("thrice", ["abc"], {}, [9.0]),
        ("named", ["so", "no"], {}, [1.0, 0.0]),
    ],
)
def test_signatures(own, name, texts, columns, expected):
    assert values(own, name, texts, example(**columns)) == expected


def test_one_bad_completion_of_a_batch_fails_alone(own):
    found = values(own, "fragile", ["ab", "", "a"], example(), example())
    line = 1 + OWN[: OWN.index("1.0 / len")].count("\n")
    assert (found[0], found[2]) == (0.5, 1.0)
    assert found[1] == f"{own}:fragile raised ZeroDivisionError: float division by zero ({own}:{line})"


def test_what_a_batch_may_not_return(own):
    assert "raised ValueError: returned 2 values for 1 completions" in values(own, "short", ["a", "b"])[0]
    assert (
        "no column no_such_column in this row, which has question, answer, id, ways, solution, level"
        in (values(own, "absent", ["a", "b"])[0])
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "one(completion) is called neither as (example, completion), for one, nor as TRL's"),
        ("verl", "verl(data_source, solution_str, ground_truth, extra_info=None) is called neither"),
        ("annotated", "annotated(predict: str, ground_truth: str) is called neither"),
        ("positional", "positional(completions, /) is called neither"),
        ("Needy", "the class needs model; name an instance of it instead"),
        ("scaled", "scaled(example, completion, factor, power=1) is called neither"),
        ("number", "has no function or class 'number'"),
    ],
)
def test_what_fits_neither_signature_is_refused_when_the_config_is_read(own, tmp_path, capsys, name, message):
    with pytest.raises(ConfigError) as caught:
        Rewarder(RewardSection(parts={"accuracy": 1.0, f"{own}:{name}": 1.0}), 16)
    assert str(caught.value).startswith(f"reward.parts.{own}:{name}: ")
    assert message in str(caught.value)
    if name == "verl":  # neither model nor data is there to be loaded
        config = {"run_dir": str(tmp_path), "model": {"path": "no/model"}, "train": {"steps": 1}}
        config |= {"data": {"train": [{"task": "synthetic"}]}, "reward": {"parts": {"accuracy": 1, f"{own}:verl": 1}}}
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        assert cli.main(["train", str(tmp_path / "config.yaml"), "--plan"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("as_bytes", [False, True])
def test_boxes_are_compared_by_the_sizes_of_the_images(own, tmp_path, as_bytes):
    Image.new("L", (100, 70)).save(tmp_path / "big.png")
    source = (tmp_path / "big.png").read_bytes() if as_bytes else str(tmp_path / "big.png")
    sizes = {"image_sizes": ((100, 70),), "shown_sizes": ((50, 35),)}
    row = Example("e", "?", "[20, 10, 80, 60]", (source,), columns={"answer": [20, 10, 80, 60]}, **sizes)
    assert values(own, "overlap", ["[10, 5, 40, 30]", "[20, 10, 80, 60]"], row) == [1.0, 0.0]
    assert values(own, "sees", ["a"], row) == [1.0]


def test_an_own_part_decides_success(own):
    parts = {f"{own}:Length": 1.0}
    config = RewardSection(parts=parts, success=f"{own}:Length", success_at=4)
    with Rewarder(config, 16) as rewarder:
        scores = rewarder.score([example()] * 2, [completion("ab"), completion("a")])
    assert [(score.success, score.parts) for score in scores] == [
        (True, {f"{own}:Length": 4.0}),
        (False, {f"{own}:Length": 2.0}),
    ]
    with pytest.raises(ValueError, match=r"reward\.parts must hold accuracy, which decides success"):
        RewardSection(parts=parts)
    config = RewardSection(parts={f"{own}:sometimes": 1.0}, success=f"{own}:sometimes")
    with Rewarder(config, 16) as rewarder:
        scores = rewarder.score([example()] * 2, [completion("none"), completion("so")])
    assert [score.success for score in scores] == [False, True]


def test_a_part_that_fails_on_most_completions_stops_the_run(own, caplog):
    texts = ["", "", "ab"]
    assert len(values(own, "fragile", texts)) == 3  # without being asked to stop
    with pytest.raises(RewardError) as caught:
        values(own, "fragile", texts, stop=True)
    definition = 1 + OWN[: OWN.index("def fragile")].count("\n")
    assert str(caught.value) == (
        f"reward.parts.{own}:fragile fails on 2 of 3 completions, more than reward.max_failed = 0.5 allows. "
        f"The first: {own}:fragile raised ZeroDivisionError: float division by zero ({own}:{definition + 1}), "
        f"for example e1 (rows.jsonl, line 7) and the completion ''. Mend {own}:{definition}"
    )
    assert len(values(own, "fragile", texts, stop=True, max_failed=0.7)) == 3
    with pytest.raises(RewardError, match="no column no_such_column"):
        values(own, "absent", texts, stop=True)


def test_repeated_messages_are_counted(own, caplog):
    values(own, "fragile", [""] * 25)
    assert [record.getMessage().split("zero ")[1].partition(") ")[2] for record in caplog.records] == [
        "",
        "(10 times so far; repeated messages are left out)",
    ]


def test_answers_that_time_out_on_one_problem_stop_nothing():
    endless = [rf"\sum_{{k=1}}^{{10^{{9}}}} \sqrt{{k + {a}}}" for a in (1, 2)]
    hard = Example("e1", "?", endless[0])
    with Rewarder(RewardSection(time_limit_s=0.3), 16) as rewarder:
        scores = rewarder.score([hard] * 2, [completion(rf"\boxed{{{endless[1]}}}")] * 2, stop=True)
    assert [score.error for score in scores] == ["accuracy: timed out after 0.3 s"] * 2


def test_a_run_counts_failures_in_step_line_summary_and_exit_status(own, tmp_path, capsys):
    """Of `odd`, which fails on one completion in a few, and of list golds and box rewards on a real image."""
    (tmp_path / "odd.py").write_text("def odd(example, completion):\n    return 1 / (sum(completion.token_ids) % 3)\n")
    Image.new("L", (100, 70)).save(tmp_path / "big.png")
    row = {"question": "Where?", "answer": [20, 10, 80, 60], "images": ["big.png"]}
    (tmp_path / "rows.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    run_dir = tmp_path / "run"
    config = {
        "run_dir": str(run_dir),
        "model": {"path": "data/warm_start/vl", "device": "cpu"},
        "data": {"train": [{"task": "files", "path": str(tmp_path / "rows.jsonl")}]},
        "train": {"steps": 2},
        "rollout": {"prompts_per_step": 2, "completions_per_prompt": 6, "max_new_tokens": 40},
        "reward": {"parts": {"accuracy": 1.0, f"{tmp_path}/odd.py:odd": 1.0}, "max_failed": 0.99},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 3
    said, summary = capsys.readouterr().out, json.loads((run_dir / "summary.json").read_text())
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    failed = sum(step["reward/errors"] for step in metrics)
    assert 0 < failed == summary["reward_errors"]["completions"] < 24
    assert summary["reward_errors"]["kinds"] == {f"{tmp_path}/odd.py:odd raised ZeroDivisionError": failed}
    worst = max(step["reward/errors"] for step in metrics)
    assert f"reward errors {worst:.0f}" in said
    assert f"reward error, {failed:,.0f} times: " in said


ROWS = {
    "verl": {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>Which?"}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"level": 3},
        "images": ["big.png"],
    },
    "trl": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
        "answer": "red",
        "extra_info": {"level": 3},
        "images": ["big.png"],
    },
    "llava": {
        "conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}],
        "extra_info": {"level": 3},
        "image": "big.png",
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_columns_of_chat_rows_reach_the_function(tmp_path, kind):
    row = ROWS[kind]
    Image.new("RGB", (100, 70), "red").save(tmp_path / "big.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    prompt = row.get("prompt", [{"role": "user", "content": "<image>Which?"}])
    (tmp_path / "own.py").write_text(
        "def extra(prompts, completions, answer, extra_info, images, **kwargs):\n"
        f"    assert prompts[0] == {prompt!r} and answer[0] == 'red'\n"
        f"    assert set(kwargs) >= {set(row) - {'prompt', 'images', 'image', 'extra_info', 'answer'}!r}\n"
        "    assert 'image' not in kwargs and images[0][0].getpixel((0, 0)) == (255, 0, 0)\n"
        "    return [info['level'] * len(c[0]['content']) for c, info in zip(completions, extra_info)]\n"
    )
    read = FileTask(str(tmp_path / "rows.jsonl"))[0]
    assert values(tmp_path / "own.py", "extra", ["ab", "a"], read) == [6.0, 3.0]
