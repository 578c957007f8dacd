import math
import re
from html.parser import HTMLParser

import pytest
from run_folders import evaluate, noise_image

from mm_agrae.errors import RunFolderError
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import RolloutRecord
from mm_agrae.view.page import Html, el, page
from mm_agrae.view.plots import Line, plot
from mm_agrae.view.report import write_report, write_runs_report

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)></pre></details></body>"
    "<style>*{display:none}</style>&lt;b&gt; \"'> \ud800 \0 \x1b[2J \u202e javascript:alert(3)"
)
SHOWN = HOSTILE.replace("\ud800", "\ufffd").replace("\0", "␀").replace("\x1b", "␛")

CONFIG = """
model: {path: data/warm_start}
train: {steps: 40}
rollout: {prompts_per_step: 4, completions_per_prompt: 8}
advantage: {rule: RULE, alpha: 0.5}
update: {loss: grpo}
"""


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each."""

    void = ("img", "meta", "link")

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [*self.open]))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag, **attributes):
        return [
            attrs
            for name, attrs, _ in self.elements
            if name == tag and all(attrs.get(key.rstrip("_")) == v for key, v in attributes.items())
        ]

    def titles(self):
        return re.findall(r"(\S.*) by (?:step|k): ", "\n".join(
            svg["aria-label"] for svg in self.all("svg")
        ))  # fmt: skip


def train(run, steps, text="fine", group=8):
    for step in range(1, steps + 1):
        share = step / steps
        run.append_metrics(
            {
                "step": step,
                "reward/mean": share,
                "reward/accuracy": share,
                "success/mean": share if step % 7 else math.nan,
                "advantage/omega": share,
                "groups/all_correct": share / 2,
                "groups/all_incorrect": (1 - share) / 2,
                "groups/mixed": 0.5,
                "policy/clip_low": 0.0,
                "policy/clip_high": 0.0,
                "update/learning_rate": 1e-6,
                "update/grad_norm": 10.0 ** (step % 5),
                "seconds/rollout": 0.5,
                "seconds/update": 0.25,
                "seconds/total": 1.0,
                "tokens/completion": 1000,
            }
        )
    records = []
    for prompt, correct in enumerate((group // 2, 0, group, 1)):
        for index in range(group):
            records.append(
                RolloutRecord(
                    step=steps, prompt_index=prompt, completion_index=index, example_id=text,
                    question=f"<image> {text}", prompt_text=text, answer=text,
                    completion=f"{text} p{prompt} c{index}", tokens=9, finish_reason=text,
                    reward=0.5, success=index < correct,
                    images=(run.store_image(noise_image(prompt)),),
                    parts={text: 0.25}, error=text if index == 1 else "", advantage_before=1.5,
                    advantage_sample_level=-0.25, advantage=0.125, meta={text: text},
                )
            )  # fmt: skip
    run.write_rollouts(steps, records)


def whole_run(path, rule="agrae", text="fine", steps=40):
    run = RunFolder(path).create(CONFIG.replace("RULE", rule), {"torch": "2.13.0"})
    evaluate(run, "before", [0, 0, 2, 3, 0], text=text, full=True)
    train(run, steps, text)
    evaluate(run, "step_000020", [2, 1, 2, 3, 0], text=text, full=True)
    evaluate(run, "after", [4, 1, 2, 1, 0], text=text, full=True)
    run.write_summary({"seconds": {"rollout": 20, "total": 50}, "peak_memory_mb": 1234.5})
    return run


def assert_self_contained(parsed):
    assert not parsed.all("script")
    for tag, attrs, _ in parsed.elements:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
        assert tag not in ("iframe", "object", "embed", "form", "base")
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert len(parsed.all("style")) == 1


def test_report_of_a_whole_run(tmp_path):
    run = whole_run(tmp_path / "my run")
    path = write_report(run.path)
    assert path == run.path / "report.html"
    parsed = Parsed(path)
    assert_self_contained(parsed)
    text = parsed.text
    assert "my run" in text
    assert "agrae alpha=0.5" in text
    assert "Finished after 40 steps." in text
    # 5 of 20 samples correct before, 8 after, and the interval of the difference.
    assert "25.0 → 40.0\N{NO-BREAK SPACE}%" in text
    assert "+15.0 points (" in text
    table = run.read_evaluations()[-1].pass_at_k[4]
    assert f"{100 * table.mean:.1f} ({100 * table.low:.1f}–{100 * table.high:.1f})" in text
    titles = parsed.titles()
    assert titles[:2] == ["pass@k", "pass@k during training"]
    for title in ("Reward", "Success", "ω", "Groups", "Seconds per step", "Tokens per second"):
        assert title in titles
    assert "Clipped tokens" not in titles  # always 0, so only mentioned
    assert "Learning rate 1e-06; Clipped tokens 0" in text
    assert "nan" not in path.read_text().lower().replace("data:image", "")
    assert "1,234 MB" in text
    assert "+1.50 → -0.25 → +0.12" in text


def test_report_shows_problems_that_training_solved_lost_and_left(tmp_path):
    run = whole_run(tmp_path / "run")
    parsed = Parsed(write_report(run.path))
    traces = parsed.text[parsed.text.index("Problems solved through training") :]
    traces = traces[: traces.index("Step 40")]
    asked = re.findall(r"Question (\d)", traces)
    assert asked == ["0", "1", "3", "4"]  # solved, solved, lost, left
    verdicts = re.findall(r"(before|after): (\d of 4) correct (✓|✗)", traces)
    assert verdicts == [
        *(("before", "0 of 4", "✗"), ("after", "4 of 4", "✓")),
        *(("before", "0 of 4", "✗"), ("after", "1 of 4", "✓")),
        *(("before", "3 of 4", "✓"), ("after", "1 of 4", "✗")),
        *(("before", "0 of 4", "✗"), ("after", "0 of 4", "✗")),
    ]
    assert "of before</think> 0/0" in traces  # incorrect before, correct after
    assert "of after</think> 0/0" in traces


KINDS = ["charts"] * 8 + ["counting"] * 8 + ["geometry"] * 3


def kinds_run(path, after, parts=("before", "after"), config=""):
    """8 charts, 8 counting and 3 geometry problems, all solved by half of 4 samples before."""
    run = RunFolder(path).create(config, {})
    meta = [{"family": kind, "level": 1 + i % 2, "ask": kind[:2]} for i, kind in enumerate(KINDS)]
    for name, solved in (("before", [2] * 19), ("after", after)):
        values = {"rule": [math.nan, *[float(count > 1) for count in solved[1:]]], "brevity": [250.0] * 19}
        evaluate(run, name, solved, meta=meta, parts=values if name in parts else None)
    return run


def test_what_fell_is_named_marked_and_first(tmp_path):
    # Counting: 5 of 8 are lost. Charts: one lost, one gained. Geometry: two of only three lost.
    run = kinds_run(tmp_path, [0, 3, *[2] * 6, *[0] * 5, *[2] * 3, 0, 0, 2])
    parsed = Parsed(write_report(run.path))
    top, tables = parsed.text.split("19 problems of test", 1)
    top = top[top.index("What fell") :]  # in the open, above all curves and tables
    unclear = "It is lower, but on too few problems to tell, for geometry by"
    assert f"By family: pass@1 fell for counting by 31.2 points. {unclear}" in top
    assert f"By family: pass@4 fell for counting by 62.5 points. {unclear} 66.7 points, charts by 12.5 points." in top
    assert "By level: " in top
    assert "for level 1 by" in top
    assert "By ask: pass@1 fell for co by 31.2 points." in top  # whose table is folded
    text = tables[: tables.index("By level")]
    rows = re.findall(r"(charts|counting|geometry)(\d)(\d.*? → \d.*?\.\d)", text[text.index("pass@4, change") :])
    assert rows == [
        ("geometry", "3", "50.0 → 16.7"), ("counting", "8", "50.0 → 18.8"), ("charts", "8", "50.0 → 46.9")
    ]  # fmt: skip
    assert re.search(r"▼ -62\.5 \(-\d+\.\d to -\d+\.\d\)", text)
    assert re.search(r"50\.0 → 46\.9-3\.1 \(", text)  # half a problem: not marked
    marked = parsed.all("span", class_="incorrect")
    assert len(marked) == tables.count("▼")
    assert "By ask (3)" in tables[tables.index("By level") :]  # folded, and after the open ones
    summaries = re.findall(r"<summary>([^<]*)", (run.path / "report.html").read_text())
    assert "By ask (3)" in summaries
    assert not [title for title in summaries if title.startswith(("By family", "By level"))]


def test_nothing_fell_and_samples_that_were_not_kept(tmp_path):
    run = kinds_run(tmp_path / "up", [3] * 19)
    text = Parsed(write_report(run.path)).text
    assert "pass@1 fell for no family by as much as one problem." in text
    assert "▼" not in text
    assert "What fell" not in text
    run = kinds_run(tmp_path / "lost", [1] * 16 + [0] * 3)
    for path in run.path.glob("evaluations/*/samples.jsonl"):
        path.unlink()
    text = Parsed(write_report(run.path)).text
    assert "pass@1 fell for geometry by 50.0 points, charts by 25.0 points, counting by 25.0 points." in text
    assert "geometry350.0 → 0.0▼ -50.0100.0 → 0.0▼ -100.0" in text


def test_parts_of_weight_0_are_metrics(tmp_path):
    config = "reward: {parts: {accuracy: 0, brevity: 0, format: 0.1, rule: 0, unused: 0}}\n"
    run = kinds_run(tmp_path / "both", [3] * 10 + [1] * 9, config=config)
    parsed = Parsed(write_report(run.path))
    # 9 × 3 of 9 × 3 + 9 correct completions after; the first problem has no rule.
    title = "correct completions that name the right rule"
    assert f"{title}100.0\N{NO-BREAK SPACE}% → 75.0\N{NO-BREAK SPACE}%all completions: 100.0" in parsed.text
    assert "brevity, correct completions250 → 250all completions: 250 → 250" in parsed.text
    assert "accuracy, correct" not in parsed.text
    assert "unused, correct" not in parsed.text
    assert "rule ✓ · brevity 250" in parsed.text  # of the traces
    run = kinds_run(tmp_path / "late", [3] * 19, parts=("after",), config=config)
    assert f"{title}– → 100.0\N{NO-BREAK SPACE}%" in Parsed(write_report(run.path)).text
    run = kinds_run(tmp_path / "old", [3] * 19, parts=(), config=config)
    assert title not in Parsed(write_report(run.path)).text


def test_earlier_steps_are_there_to_compare(tmp_path):
    run = whole_run(tmp_path / "run")
    for step in (1, 10, 20, 30):
        records = run.read_rollouts(40)
        for record in records:
            record.update(step=step, images=tuple(record["images"]))
        run.write_rollouts(step, [RolloutRecord(**record) for record in records])
    parsed = Parsed(write_report(run.path))
    titles = ["Step 1, to compare", "Step 20, to compare"]
    assert [text for text in titles if text in parsed.text] == titles
    assert "Step 10, to compare" not in parsed.text
    kinds = r"\(2 mixed, 1 all incorrect, 1 all correct\)"
    shown = re.findall(rf"Step (\d+): 4 groups {kinds}, (\d) shown", parsed.text)
    assert shown == [("40", "4"), ("1", "2"), ("20", "2")]
    (run.path / "rollouts" / "step_000020.parquet").write_bytes(b"PAR1")
    parsed = Parsed(write_report(run.path))
    assert "step_000020.parquet is damaged" in parsed.text
    assert "Step 1: 4 groups" in parsed.text


def test_model_text_is_shown_as_characters(tmp_path):
    run = whole_run(tmp_path / "run", text=HOSTILE)
    parsed = Parsed(write_report(run.path))
    assert_self_contained(parsed)
    assert parsed.text.count(f"{SHOWN} p0 c3") == 1
    assert f"{SHOWN} of before</think> 0/0" in parsed.text
    assert f"finish: {SHOWN}" in parsed.text
    assert f"error: {SHOWN}" in parsed.text
    assert len(parsed.all("img")) == 4 + 4  # the traces' and the groups', none from the text
    pre = [attrs for tag, attrs, _ in parsed.elements if tag == "pre"]
    assert all(attrs.get("dir") == "auto" for attrs in pre[:-1])  # all but the config's


def test_hostile_names_and_configs_are_shown_as_characters(tmp_path):
    run = RunFolder(tmp_path / "<b onload=x>").create(
        f"model: {{path: '<script>'}}\nadvantage: {{rule: '{'<i>' * 3}'}}\n# {HOSTILE}", {"<u>": "<script>"}
    )
    evaluate(run, "<script>", [1, 0], label="<script>")
    run.append_metrics({"step": 1, "reward/<script>": 1.0, "reward/mean": 0.5})
    parsed = Parsed(write_report(run.path))
    assert_self_contained(parsed)
    assert not parsed.all("b", onload="x")
    assert not parsed.all("u")
    assert "<b onload=x>" in parsed.text


@pytest.mark.parametrize("broken", ["model: [", "just text", "", "model: 3\nadvantage: [1]"])
def test_report_of_a_run_that_has_just_begun(tmp_path, broken):
    run = RunFolder(tmp_path / "run").create(broken, {})
    parsed = Parsed(write_report(run.path))
    for text in ("Not evaluated yet.", "No step has been logged yet.", "No rollouts were kept."):
        assert text in parsed.text


def test_report_of_a_run_going_on(tmp_path):
    run = RunFolder(tmp_path / "run").create(CONFIG, {})
    evaluate(run, "before", [0, 1])
    for step in (1, 2):
        run.append_metrics({"step": step, "reward/mean": 0.5 * step, "advantage/omega": None})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    parsed = Parsed(write_report(run.path))
    assert "Not finished: 2 of 40 steps so far." in parsed.text
    assert "pass@1, before" in parsed.text
    assert parsed.titles() == ["pass@k", "Reward"]


def test_report_of_evaluations_without_training(tmp_path):
    run = RunFolder(tmp_path / "eval").create(CONFIG, {})
    for name, solved in (("models/base", [0, 1, 2]), ("models/agrae", [1, 3, 2])):
        evaluate(run, name, solved)
    parsed = Parsed(write_report(run.path))
    assert "An evaluation of checkpoints, without training." in parsed.text
    assert parsed.all("svg", **{"aria-label": "pass@k by k: models/agrae, models/base"})
    assert "No step" not in parsed.text


def test_report_without_samples_or_images(tmp_path):
    run = whole_run(tmp_path / "run")
    (run.path / "evaluations/before/samples.jsonl").unlink()
    first, second, *_ = sorted((run.path / "images").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    parsed = Parsed(write_report(run.path))
    assert "The samples of the evaluations were not kept." in parsed.text
    assert "points (" not in parsed.text
    assert "image missing" in parsed.text
    assert "image damaged" in parsed.text


def test_report_names_what_is_wrong(tmp_path):
    with pytest.raises(RunFolderError, match="no run here"):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match="no run here"):
        write_runs_report([tmp_path], tmp_path / "out.html")
    run = whole_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="given twice"):
        write_runs_report([run.path, run.path], tmp_path / "out.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="a file stands in the way"):
        write_runs_report([run.path], tmp_path / "file" / "out.html")


def test_a_page_stays_small_however_long_the_run(tmp_path):
    text = "&" * 20_000  # five times as long when escaped
    run = whole_run(tmp_path / "run", text=text, steps=1000)
    records = []
    for prompt in range(8):
        image = run.store_image(noise_image(prompt, 500))  # noise: 750 kB as a PNG
        for index in range(64):
            records.append(
                RolloutRecord(
                    step=1001, prompt_index=prompt, completion_index=index, example_id="e",
                    question=text, prompt_text="", answer=text, completion=text, tokens=9,
                    finish_reason="length", reward=1.0, success=index % 2 == 0,
                    images=(image, image),
                )
            )  # fmt: skip
    run.write_rollouts(1001, records)
    path = write_report(run.path)
    assert path.stat().st_size < 3_000_000
    parsed = Parsed(path)
    assert "characters left out" in parsed.text
    assert "and 48 more" in parsed.text
    sources = [attrs["src"] for attrs in parsed.all("img", alt="image of the problem")]
    assert any(source.startswith("data:image/jpeg") for source in sources)
    assert "image left out" in parsed.text
    longest = max(len(attrs["d"]) for attrs in parsed.all("path"))
    assert longest < 8000


def test_write_runs_report(tmp_path):
    first = whole_run(tmp_path / "a" / "run", "agrae")
    second = whole_run(tmp_path / "b" / "run", "grpo", steps=25)
    empty = RunFolder(tmp_path / "c").create("", {})
    out = tmp_path / "new" / "compare.html"
    assert write_runs_report([first.path, second.path, empty.path], out) == out
    parsed = Parsed(out)
    assert_self_contained(parsed)
    # Both began from the same checkpoint: its curve is drawn once.
    (label,) = {a["aria-label"] for a in parsed.all("svg") if "pass@k" in a["aria-label"]}
    names = [f"{tmp_path.name}/c", "a/run", "b/run"]
    assert label == "pass@k by k: before, a/run, b/run"
    assert all(name in parsed.text for name in names)
    assert "Reward" in parsed.titles()
    rows = re.search(r"advantage\.rule(agrae)(grpo)–", parsed.text)
    assert rows, parsed.text[-500:]
    assert "update.loss" in parsed.text  # the third has none
    write_runs_report([empty.path], out)
    assert "None of these runs has been evaluated." in Parsed(out).text


def test_elements_escape_all_but_elements():
    assert el("p", "<b>", el("i", "&"), 3, None, class_="a\"'<", id=None, aria_label="x") == (
        '<p class="a&quot;&#x27;&lt;" aria-label="x">&lt;b&gt;<i>&amp;</i>3</p>'
    )
    assert isinstance(el("p"), Html)
    assert "<b>" not in page("<b>", Html(""), [("<b>", el("p", "<b>"))])


def heights(figure, css):
    """y coordinates of the path of a class."""
    (path,) = re.findall(rf'<path d="([^"]+)" class="{css}"', figure)
    return [float(point.split(",")[1]) for point in path[1:].split("L")]


def test_plots_put_values_where_the_axis_says():
    points = [(1, 0.0), (2, 0.25), (4, 1.0)]
    band = [(x, y * 0.9, y) for x, y in points]
    figure = plot("t", [Line("a", points, band)], log2=True, shares=True)
    ticks = re.findall(r'<text x="40.0" y="([\d.]+)"[^>]*>(\d+)\s%', figure)
    where = {int(text) / 100: float(y) - 4 for y, text in ticks}
    ys = heights(figure, "c0 line")
    assert ys[0] == pytest.approx(where[0.0], abs=0.1)
    assert ys[2] == pytest.approx(where[1.0], abs=0.1)
    assert ys[1] == pytest.approx(0.75 * where[0.0] + 0.25 * where[1.0], abs=0.1)
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', figure)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)  # powers of 2, evenly


def test_labels_of_small_numbers_are_not_cut_off():
    """Learning rates: every label of the axis lies inside the picture, at 7 units a character."""
    figure = plot("Learning rate", [Line("rate", [(1, 0.0), (2, 1.24e-6)])], zero=True)
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)', figure)[:6]
    assert [text for _, text in labels] == ["0", "2.5e-07", "5e-07", "7.5e-07", "1e-06", "1.25e-06"]
    assert all(float(x) >= 7 * len(text) for x, text in labels)


def test_stacked_plots_add_up():
    lines = [Line("a", [(0, 1), (1, 3)], color=0), Line("b", [(0, 2), (1, 1)], color=1)]
    figure = plot("t", lines, stacked=True)
    top = heights(figure, "c1 area")[:2]
    base = heights(figure, "c0 area")[2]
    unit = (base - top[0]) / 3
    assert base - top[1] == pytest.approx(4 * unit, abs=0.2)
    assert base - heights(figure, "c0 area")[0] == pytest.approx(unit, abs=0.2)


@pytest.mark.parametrize(
    "ys", [[0.0], [5.0, 5.0], [-3.0, -3.0], [1e-12, 2e-12], [1e30, -1e30], [1e9, 1e9 + 1], [0.1] * 50]
)
def test_plots_of_odd_ranges(ys):
    points = [(float(i), y) for i, y in enumerate(ys)]
    figure = plot("t", [Line("a", points)], smooth=True)
    assert all(0 <= y <= 220 for y in heights(figure, "c0 line"))
    assert figure.count("<text") >= 2
