"""The playground's logic on the embedded checkpoints: streaming, stopping, grading, tokens."""

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import checkpoints
import pytest
import torch
from helpers import ROOT, TEXT, VL, engine, policy, processing, sampling
from PIL import Image

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.errors import ConfigError, DataError, ModelError
from mm_agrae.rollout import derive_seed
from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.view import playground_view as view
from mm_agrae.view.demo_settings import DemoSettings, embedded_models, embedded_runs, settings_for
from mm_agrae.view.playground import (
    MAX_QUESTION,
    Ask,
    Column,
    Models,
    Run,
    Stopped,
    Token,
    Trace,
    agreement,
    in_words,
    read_picture,
    right,
    split_thinking,
)

PATHS = {"vl": VL, "text": TEXT}
DRAWN = SyntheticTask("test")[3]
DESCRIBED = SyntheticTask("test", modality="text")[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    endless = checkpoints.endless(tmp_path_factory.mktemp("models") / "endless")
    return Models(PATHS | {"endless": endless}, device="cpu")


def ask(**changes) -> Ask:
    values = {
        "question": DRAWN.question,
        "picture": DRAWN.images[0],
        "answer": DRAWN.answer,
        "described": DESCRIBED.question,
        "grading": DRAWN.grading,
        "samples": 3,
        "max_new_tokens": 48,
    }
    return Ask(**(values | changes))


def finish(models, names, question, **options) -> tuple[Column, ...]:
    return list(Run(models, names, question, **options).stream())[-1]


def playground_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("playground")]


# -- the samples are the engine's own


@pytest.mark.parametrize("name", ["vl", "text"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_what_streams_is_what_the_engine_samples(models, name, temperature):
    question = ask(temperature=temperature, seed=5)
    (column,) = finish(models, [name], question)
    example = DRAWN if name == "vl" else DESCRIBED
    prompt = processing(PATHS[name]).prompt(example)
    count = 3 if temperature else 1
    settings = sampling(temperature=temperature, max_new_tokens=48)
    made = policy(PATHS[name])
    expected = engine(made).generate([prompt], count, settings, [derive_seed("playground", 5)])[0]
    assert [trace.text for trace in column.traces] == [c.text for c in expected]
    assert [trace.state for trace in column.traces] == [c.finish_reason for c in expected]
    assert [trace.count for trace in column.traces] == [len(c.token_ids) for c in expected]
    # Probability and entropy are the policy's own at temperature 1.
    batch = micro_batch([prompt], [UpdateRow(0, c, 0.0) for c in expected], made.device)
    with torch.no_grad():
        logp_BT, entropy_BT = made(batch)
    for row, trace in enumerate(column.traces):
        length = trace.count
        probability = torch.tensor([token.probability for token in trace.tokens])
        entropy = torch.tensor([token.entropy for token in trace.tokens])
        torch.testing.assert_close(probability, logp_BT[row, :length].exp(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(entropy, entropy_BT[row, :length], atol=1e-3, rtol=1e-3)
        for token in trace.tokens:
            best = [p for _, p in token.alternatives]
            assert best == sorted(best, reverse=True)
            assert best[0] >= token.probability - 1e-6


def test_answers_grow_token_by_token(models):
    snapshots = []
    stream = Run(models, ["endless"], ask(samples=16, max_new_tokens=1024)).stream()
    for (column,) in stream:
        if column.tokens:
            snapshots.append(column)
        if len(snapshots) == 5:
            break
    stream.close()
    counts = [column.tokens for column in snapshots]
    assert counts == sorted(set(counts))
    for earlier, later in itertools.pairwise(snapshots):
        for one, other in zip(earlier.traces, later.traces, strict=True):
            assert one.state == "writing"
            assert (one.success, one.tokens) == (None, ())
            assert other.text.startswith(one.text)


def test_an_answer_ends_with_its_parts_and_its_verdict(models):
    snapshots = list(Run(models, ["vl", "text"], ask()).stream())
    for column in snapshots[-1]:
        assert column.state == "done"
        for trace in column.traces:
            assert trace.thought.startswith("Read")
            assert "think" not in trace.thought + trace.answer
            assert "".join(token.text for token in trace.tokens).startswith(trace.text)
            assert trace.success is (trace.final == DRAWN.answer)
    assert {trace.success for column in snapshots[-1] for trace in column.traces} == {True, False}


def test_a_text_model_is_asked_in_words_and_a_typed_question_as_typed(models):
    vl, text = finish(models, ["vl", "text"], ask(max_new_tokens=2))
    assert (vl.asked, text.asked) == (DRAWN.question, DESCRIBED.question)
    (text,) = finish(models, ["text"], ask(described="", max_new_tokens=2))
    assert text.asked == DRAWN.question


def test_without_a_gold_answer_nothing_is_graded(models):
    (column,) = finish(models, ["vl"], ask(answer="  "))
    assert [trace.success for trace in column.traces] == [None] * 3
    assert all(trace.final for trace in column.traces)
    assert right(column.traces) == ""


def test_an_answer_cut_off_by_the_limit_says_so(models):
    (column,) = finish(models, ["vl"], ask(max_new_tokens=4))
    assert [trace.state for trace in column.traces] == ["length"] * 3
    assert [trace.final for trace in column.traces] == [None] * 3
    assert "cut off" in view.answers((column,), ask())


# -- stopping


def long_ask() -> Ask:
    return ask(samples=16, max_new_tokens=1024)


def test_stopping_ends_the_sampling_and_the_processor_goes_quiet(models):
    run = Run(models, ["endless", "text"], long_ask())
    stream = run.stream()
    for columns in stream:
        if columns[0].tokens > 50 and columns[1].state == "done":
            run.cancel()
            break
    endless, text = list(stream)[-1]
    assert (endless.state, text.state) == ("stopped", "done")
    assert playground_threads() == []
    assert 50 < endless.tokens < 16 * 1024
    for trace in endless.traces:
        assert (trace.state, trace.success) == ("stopped", None)
        assert trace.count == len(trace.tokens)
    # What is left is this thread: asleep, it uses no processor time. A run would use all of it.
    used = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - used < 0.5


def test_leaving_the_stream_stops_the_sampling(models):
    stream = Run(models, ["endless"], long_ask()).stream()
    for columns in stream:
        if columns[0].tokens:
            break
    assert playground_threads()
    stream.close()
    assert playground_threads() == []


def test_a_run_stopped_before_its_turn_writes_nothing(models):
    stop = threading.Event()
    stop.set()
    (column,) = finish(models, ["vl"], ask(), stop=stop)
    assert (column.state, column.traces) == ("stopped", ())


def test_what_a_watcher_raises_ends_the_engine_and_leaves_it_usable(models):
    made = policy(VL)
    prompt = processing(VL).prompt(DRAWN)
    steps = []

    def watch(row_B, token_B, logits_BV):
        steps.append(len(row_B))
        if len(steps) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        engine(made).generate([prompt], 4, sampling(), [0], on_tokens=watch)
    assert steps == [4, 4, 4]
    seen = {}
    prompts = [prompt, prompt, prompt]

    def collect(row_B, token_B, logits_BV):
        for row, token in zip(row_B.tolist(), token_B.tolist(), strict=True):
            seen.setdefault(row, []).append(token)

    groups = engine(made, batch_completions=2).generate(
        prompts, 2, sampling(), [1, 2, 3], on_tokens=collect
    )
    plain = engine(made).generate(prompts, 2, sampling(), [1, 2, 3])
    assert groups == plain
    flat = [completion.token_ids for group in groups for completion in group]
    assert [tuple(seen[row]) for row in range(6)] == flat


# -- several users


def test_two_runs_at_once_get_what_each_gets_alone(models):
    questions = [ask(seed=1), ask(seed=2, question="How many bars?", answer="", described="")]
    alone = [finish(models, ["vl"], question)[0] for question in questions]
    together = [None, None]

    def work(index):
        together[index] = finish(models, ["vl"], questions[index])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.traces for c in together] == [c.traces for c in alone]
    assert alone[0].traces != alone[1].traces


def test_a_checkpoint_is_loaded_once_and_the_oldest_leaves(tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(TEXT, tmp_path / name)
    models = Models({name: str(tmp_path / name) for name in "abc"}, device="cpu", keep=2)
    found = []
    threads = [threading.Thread(target=lambda: found.append(models.get("a"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is found[2]
    models.get("b")
    assert models.get("a") is found[0]
    models.get("c")  # b was used longest ago
    shutil.rmtree(tmp_path / "b")
    assert models.get("a") is found[0]
    with pytest.raises(ModelError, match="no such folder"):
        models.get("b")


def test_what_reads_pictures_is_told_without_loading():
    models = Models(PATHS, device="cpu")
    assert models.reads_pictures("vl")
    assert not models.reads_pictures("text")
    assert models._loaded == {}


# -- what is refused, in plain words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": "  "}, "Type a question first"),
        ({"question": "a" * (MAX_QUESTION + 1)}, "20,001 characters"),
        ({"samples": 17}, "number of samples is 17"),
        ({"samples": 0}, "number of samples is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 5000}, "length is 5000"),
    ],
)
def test_what_cannot_be_asked_is_refused(models, changes, said):
    with pytest.raises(DataError, match=said):
        Run(models, ["vl"], ask(**changes))


@pytest.mark.parametrize("names", [[], ["vl"] * 4])
def test_one_to_three_checkpoints(models, names):
    with pytest.raises(DataError, match="one to 3 checkpoints"):
        Run(models, names, ask())


def test_a_path_is_no_checkpoint_unless_that_is_allowed(models):
    with pytest.raises(ModelError, match="--allow-model-paths"):
        Run(models, [VL], ask())
    open_to_paths = Models({}, device="cpu", allow_paths=True)
    (column,) = finish(open_to_paths, [VL], ask(max_new_tokens=2))
    assert column.state == "done"
    (column,) = finish(open_to_paths, ["/nowhere/at/all"], ask())
    assert column.state == "failed"
    assert "no such folder" in column.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": "word " * 3000}, "has room for 2,000 beside an answer of 48"),
        ({"question": "Is <|im_end|> a word?"}, "control token <|im_end|>; remove it"),
        ({"question": "<image> or <image>?"}, "2 <image> markers for 1 images"),
    ],
)
def test_one_checkpoint_may_fail_while_the_other_answers(models, changes, said):
    described = {"described": DESCRIBED.question}
    vl, text = finish(models, ["vl", "text"], ask(**changes, **described))
    assert (vl.state, text.state) == ("failed", "done")
    assert said in vl.message
    assert said in view.answers((vl, text), ask()).replace("&lt;", "<").replace("&gt;", ">")


def test_pictures_are_refused_in_plain_words_without_a_path(tmp_path):
    text, wide, tiny = tmp_path / "a.png", tmp_path / "wide.png", tmp_path / "tiny.png"
    text.write_text("no picture")
    Image.new("1", (3000, 1500)).save(wide)
    Image.new("RGB", (4, 4)).save(tiny)
    for path, said in ((text, "not an image"), (wide, "3,000×1,500"), (tiny, "too small")):
        with pytest.raises(DataError, match=said) as caught:
            read_picture(str(path), max_pixels=1_000_000)
        assert str(tmp_path) not in str(caught.value)
        assert str(caught.value).startswith("The picture")


# -- reasoning, agreement, words


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>a</think> b", False, ("a", "b")),
        ("a</think>b", True, ("a", "b")),
        ("a</think>b", False, ("a", "b")),
        ("<think>a", False, ("a", "")),
        ("a", True, ("a", "")),
        ("a", False, ("", "a")),
        ("", False, ("", "")),
        ("<think>a</think>b</think>c", False, ("a</think>b", "c")),
        ("x <think>a", False, ("x a", "")),
    ],
)
def test_reasoning_is_set_apart(text, opened, expected):
    assert split_thinking(text, opened) == expected


def trace(final, success=None, state="stop", text="t") -> Trace:
    return Trace(text, 1, state, "", text, final, success)


def test_agreement_counts_answers_of_one_value_as_one():
    traces = [trace(a, a == "1/2") for a in ("7", "1/2", "0.5", "7", r"\frac{1}{2}", "7.0")]
    traces += [trace(None, False), trace(None, False), trace("9", None, "stopped")]
    shares = agreement(traces, {"kind": "number"})
    assert [(s.answer, s.count) for s in shares] == [("7", 3), ("1/2", 3), (None, 2)]
    assert sum(share.share for share in shares) == pytest.approx(1)
    assert agreement([], {}) == []


def test_agreement_of_choices_knows_letter_and_text():
    grading = {"kind": "choice", "choices": ["12", "15"]}
    shares = agreement([trace("B"), trace("15"), trace("A")], grading)
    assert [(share.answer, share.count) for share in shares] == [("B", 2), ("A", 1)]


def test_words_on_how_far_it_is():
    columns = (
        Column("base", "writing", traces=(trace("1"), trace(None, state="writing")), seconds=0.5),
        Column("GRPO", "loading"),
        Column("A", "failed", "no such folder"),
    )
    assert in_words(columns) == (
        "base: 1 of 2 written, 2 tokens, 4 tokens/s · GRPO: loading · A: failed"
    )
    assert right([trace("1", True), trace("2", False)]) == "1 of 2 right (50.0\N{NO-BREAK SPACE}%)"


# -- markup


HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m\ud800'


def test_a_hostile_text_stays_text():
    token = Token(HOSTILE, 0.5, 1.0, ((HOSTILE, 0.5),))
    hostile = Trace(HOSTILE, 1, "stop", HOSTILE, HOSTILE, HOSTILE, False, (token,))
    column = Column(HOSTILE, "failed", HOSTILE, HOSTILE, (hostile, hostile))
    shown = (
        view.answers((column,), ask(question=HOSTILE))
        + view.tokens(hostile, view.ENTROPY)
        + view.note_on_pictures({HOSTILE: False, "b": True})
    )
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 9
    shown.encode()  # no half of a surrogate pair is left


def test_tokens_have_the_colour_of_their_numbers():
    numbers = [(0.995, 0.01), (0.95, 0.2), (0.8, 0.5), (0.5, 1.0), (0.2, 1.5), (0.05, 3.0)]
    tokens = tuple(Token(f"t{i}", p, e, ((f"t{i}", p),)) for i, (p, e) in enumerate(numbers))
    shown = Trace("", 6, "stop", "", "", tokens=tokens)
    for by in (view.PROBABILITY, view.ENTROPY):
        markup = view.tokens(shown, by)
        for i in range(6):
            assert f'<span class="h{i}" title="“t{i}”: probability' in markup
    assert "no tokens" not in view.tokens(None, view.ENTROPY)
    assert 'class="empty"' in view.tokens(None, view.ENTROPY)


def test_the_note_says_who_does_not_use_the_picture():
    assert view.note_on_pictures({"a": True}) is None
    assert view.note_on_pictures({}) is None
    assert "not used by <b>b</b>" in view.note_on_pictures({"a": True, "b": False})
    assert "reads text alone" in view.note_on_pictures({"b": False})


# -- settings and packaging


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
    own = {k: v for k, v in settings.models.items() if k not in embedded_models()}
    assert own == {"run": str(folder), "run (2)": str(other)}


def test_a_folder_of_runs_is_taken_whole_and_a_typing_error_is_told(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("{}")
    settings = settings_for([str(tmp_path)])
    assert settings.runs == (tmp_path, *embedded_runs())
    assert dict(settings.models) == embedded_models()
    for path in (str(tmp_path / "b"), "no such", "a/b/c", "../x"):
        with pytest.raises(ConfigError, match="no run folder, checkpoint or model id"):
            settings_for([path])


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
    listed = project["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "mm_agrae").rglob("__init__.py")}
    assert sorted(listed) == sorted([*(".".join(f.parts) for f in folders), "mm_agrae_demo"])
    assert project["tool"]["setuptools"]["package-dir"] == {"mm_agrae_demo": "demo"}
    assert Path(ROOT, "demo", "__init__.py").is_file()
