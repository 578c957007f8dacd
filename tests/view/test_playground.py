"""The playground's generation on the embedded checkpoints: streaming, stopping, refusals."""

import itertools
import shutil
import threading

import checkpoints
import pytest
import torch
from helpers import TEXT, VL, assert_equal_up_to_rounding, engine, policy, processing, sampling
from PIL import Image

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.errors import DataError, ModelError
from mm_agrae.rollout import derive_seed
from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.view import playground_view as view
from mm_agrae.view.playground import MAX_QUESTION, Problem, Question, SideBySide, Stopped, read_image
from mm_agrae.view.playground_checkpoints import CheckpointCache

PATHS = {"vl": VL, "text": TEXT}
EXAMPLE = SyntheticTask("test")[3]
DESCRIBED = SyntheticTask("test", modality="text")[3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    endless = checkpoints.endless(tmp_path_factory.mktemp("models") / "endless")
    return CheckpointCache(PATHS | {"endless": endless}, device="cpu")


def ask(**changes) -> Question:
    values = {
        "text": EXAMPLE.question,
        "image": EXAMPLE.images[0],
        "answer": EXAMPLE.answer,
        "described": DESCRIBED.question,
        "grading": EXAMPLE.grading,
        "samples": 3,
        "max_new_tokens": 48,
    }
    return Question(**(values | changes))


def finish(cache, names, question, **options):
    return list(SideBySide(cache, names, question, **options).stream())[-1]


def playground_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("playground")]


# -- the samples are the engine's own


@pytest.mark.parametrize("name", ["vl", "text"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_what_streams_is_what_the_engine_samples(cache, name, temperature):
    question = ask(temperature=temperature, seed=5)
    (shown,) = finish(cache, [name], question)
    example = EXAMPLE if name == "vl" else DESCRIBED
    prompt = processing(PATHS[name]).prompt(example)
    count = 3 if temperature else 1
    settings = sampling(temperature=temperature, max_new_tokens=48)
    made = policy(PATHS[name])
    expected = engine(made).generate([prompt], count, settings, [derive_seed("playground", 5)])[0]
    assert [trace.text for trace in shown.traces] == [c.text for c in expected]
    assert [trace.state for trace in shown.traces] == [c.finish_reason for c in expected]
    assert [trace.count for trace in shown.traces] == [len(c.token_ids) for c in expected]
    # Probability and entropy are the policy's at temperature 1.
    batch = micro_batch([prompt], [UpdateRow(0, c, 0.0) for c in expected], made.device)
    with torch.no_grad():
        logp_BT, entropy_BT = made(batch)
    for row, trace in enumerate(shown.traces):
        length = trace.count
        probability = torch.tensor([token.probability for token in trace.tokens])
        entropy = torch.tensor([token.entropy for token in trace.tokens])
        torch.testing.assert_close(probability, logp_BT[row, :length].exp(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(entropy, entropy_BT[row, :length], atol=1e-3, rtol=1e-3)
        for token in trace.tokens:
            best = [p for _, p in token.alternatives]
            assert best == sorted(best, reverse=True)
            assert best[0] >= token.probability - 1e-6


def test_completions_grow_token_by_token(cache):
    snapshots = []
    stream = SideBySide(cache, ["endless"], ask(samples=16, max_new_tokens=1024)).stream()
    for (shown,) in stream:
        if shown.tokens:
            snapshots.append(shown)
        if len(snapshots) == 5:
            break
    stream.close()
    counts = [shown.tokens for shown in snapshots]
    assert counts == sorted(set(counts))
    for earlier, later in itertools.pairwise(snapshots):
        for one, other in zip(earlier.traces, later.traces, strict=True):
            assert one.state == "writing"
            assert (one.success, one.tokens) == (None, ())
            assert other.text.startswith(one.text)


def test_a_completion_ends_with_reasoning_answer_and_verdict(cache):
    snapshots = list(SideBySide(cache, ["vl", "text"], ask()).stream())
    for shown in snapshots[-1]:
        assert shown.state == "done"
        for trace in shown.traces:
            assert trace.thought.startswith("Read")
            assert "think" not in trace.thought + trace.answer
            assert "".join(token.text for token in trace.tokens).startswith(trace.text)
            assert trace.success is (trace.final == EXAMPLE.answer)
    assert {trace.success for shown in snapshots[-1] for trace in shown.traces} == {True, False}


def test_a_text_model_is_asked_in_words(cache):
    vl, text = finish(cache, ["vl", "text"], ask(max_new_tokens=2))
    assert (vl.asked, text.asked) == (EXAMPLE.question, DESCRIBED.question)
    (text,) = finish(cache, ["text"], ask(described="", max_new_tokens=2))
    assert text.asked == EXAMPLE.question


def test_without_a_gold_answer_nothing_is_graded(cache):
    (shown,) = finish(cache, ["vl"], ask(answer="  "))
    assert [trace.success for trace in shown.traces] == [None] * 3
    assert all(trace.final for trace in shown.traces)
    assert " correct (" not in view.traces((shown,), ask(answer="  "))


def test_a_completion_cut_off_by_the_limit_says_so(cache):
    (shown,) = finish(cache, ["vl"], ask(max_new_tokens=4))
    assert [trace.state for trace in shown.traces] == ["length"] * 3
    assert [trace.final for trace in shown.traces] == [None] * 3
    assert "cut off" in view.traces((shown,), ask())


# -- stopping


def long_ask() -> Question:
    return ask(samples=16, max_new_tokens=1024)


def test_stopping_ends_the_sampling(cache):
    stop = threading.Event()
    stream = SideBySide(cache, ["endless", "text"], long_ask(), stop).stream()
    for endless, text in stream:
        if endless.tokens > 50 and text.state == "done":
            stop.set()
            break
    endless, text = list(stream)[-1]
    assert (endless.state, text.state) == ("stopped", "done")
    assert playground_threads() == []
    assert 50 < endless.tokens < 16 * 1024
    for trace in endless.traces:
        assert (trace.state, trace.success) == ("stopped", None)
        assert trace.count == len(trace.tokens)


def test_leaving_the_stream_stops_the_sampling(cache):
    stream = SideBySide(cache, ["endless"], long_ask()).stream()
    for (shown,) in stream:
        if shown.tokens:
            break
    assert playground_threads()
    stream.close()
    assert playground_threads() == []


def test_nothing_is_generated_if_stopped_before_its_turn(cache):
    stop = threading.Event()
    stop.set()
    (shown,) = finish(cache, ["vl"], ask(), stop=stop)
    assert (shown.state, shown.traces) == ("stopped", ())


def test_a_watcher_that_raises_ends_the_sampling_and_leaves_the_engine_usable(cache):
    made = policy(VL)
    prompt = processing(VL).prompt(EXAMPLE)
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

    groups = engine(made, batch_completions=2).generate(prompts, 2, sampling(), [1, 2, 3], on_tokens=collect)
    plain = engine(made).generate(prompts, 2, sampling(), [1, 2, 3])
    ours, alone = ([c for group in found for c in group] for found in (groups, plain))
    assert [c.token_ids for c in ours] == [c.token_ids for c in alone]
    assert [tuple(seen[row]) for row in range(6)] == [c.token_ids for c in ours]
    # Batches of another size may sum in another order. Each layer adds two sums of `hidden_size`
    # terms, one of `intermediate_size` and one over the context.
    config = made.hf.config.get_text_config()
    context = len(prompt) + sampling().max_new_tokens
    terms = 2 * config.hidden_size + config.intermediate_size + context
    logp, alone_logp = (torch.tensor([x for c in found for x in c.logprobs]) for found in (ours, alone))
    terms = config.num_hidden_layers * terms + config.hidden_size
    assert_equal_up_to_rounding(logp, alone_logp, terms)


# -- several users


def test_two_questions_at_once_get_what_each_gets_alone(cache):
    questions = [ask(seed=1), ask(seed=2, text="How many bars?", answer="", described="")]
    alone = [finish(cache, ["vl"], question)[0] for question in questions]
    together = [None, None]

    def work(index):
        together[index] = finish(cache, ["vl"], questions[index])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.traces for found in together] == [found.traces for found in alone]
    assert alone[0].traces != alone[1].traces


def test_a_checkpoint_is_loaded_once_and_the_least_recently_used_is_dropped(tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(TEXT, tmp_path / name)
    cache = CheckpointCache({name: str(tmp_path / name) for name in "abc"}, device="cpu", keep=2)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.get("a"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is found[2]
    cache.get("b")
    assert cache.get("a") is found[0]
    cache.get("c")  # b was used longest ago
    shutil.rmtree(tmp_path / "b")
    assert cache.get("a") is found[0]
    with pytest.raises(ModelError, match="no such folder"):
        cache.get("b")


def test_whether_a_checkpoint_reads_images_is_known_without_loading():
    cache = CheckpointCache(PATHS, device="cpu")
    assert cache.reads_images("vl")
    assert not cache.reads_images("text")
    assert cache._loaded == {}


# -- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "  "}, "Type a question first"),
        ({"text": "a" * (MAX_QUESTION + 1)}, "20,001 characters"),
        ({"samples": 17}, "number of samples is 17"),
        ({"samples": 0}, "number of samples is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 5000}, "length is 5000"),
    ],
)
def test_what_cannot_be_asked_is_refused(cache, changes, said):
    with pytest.raises(DataError, match=said):
        SideBySide(cache, ["vl"], ask(**changes))


def test_one_to_three_checkpoints(cache):
    for names in ([], ["vl"] * 4):
        with pytest.raises(DataError, match="one to 3 checkpoints"):
            SideBySide(cache, names, ask())


def test_a_path_is_no_checkpoint_unless_that_is_allowed(cache):
    with pytest.raises(ModelError, match="--allow-model-paths"):
        SideBySide(cache, [VL], ask())
    open_to_paths = CheckpointCache({}, device="cpu", allow_paths=True)
    (shown,) = finish(open_to_paths, [VL], ask(max_new_tokens=2))
    assert shown.state == "done"
    (shown,) = finish(open_to_paths, ["/nowhere/at/all"], ask())
    assert shown.state == "failed"
    assert "no such folder" in shown.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "word " * 3000}, "has room for 2,000 besides a completion of 48"),
        ({"text": "Is <|im_end|> a word?"}, "control token <|im_end|>; remove it"),
        ({"text": "<image> or <image>?"}, "2 <image> markers for 1 images"),
    ],
)
def test_one_checkpoint_may_fail_while_the_other_answers(cache, changes, said):
    vl, text = finish(cache, ["vl", "text"], ask(**changes))
    assert (vl.state, text.state) == ("failed", "done")
    assert said in vl.message
    assert said in view.traces((vl, text), ask()).replace("&lt;", "<").replace("&gt;", ">")


def test_images_are_refused_in_plain_words_without_a_path(tmp_path):
    text, wide, tiny = tmp_path / "a.png", tmp_path / "wide.png", tmp_path / "tiny.png"
    text.write_text("not an image")
    Image.new("1", (3000, 1500)).save(wide)
    Image.new("RGB", (4, 4)).save(tiny)
    for path, said in ((text, "not an image"), (wide, "3,000×1,500"), (tiny, "too small")):
        with pytest.raises(DataError, match=said) as caught:
            read_image(str(path), max_pixels=1_000_000)
        assert str(tmp_path) not in str(caught.value)
        assert str(caught.value).startswith("The image")


def test_an_edited_problem_is_a_question_of_its_own():
    problem = Problem.sample(None, with_image=True, index=3)
    asked = problem.question(problem.text, problem.answer, problem.image, samples=2)
    assert (asked.described, asked.grading) == (DESCRIBED.question, EXAMPLE.grading)
    assert (asked.image.tobytes(), asked.samples) == (EXAMPLE.images[0].tobytes(), 2)
    other_answer = problem.question(problem.text, "another", None)
    assert (other_answer.described, other_answer.grading) == (DESCRIBED.question, {})
    other_text = problem.question("Another?", problem.answer, None)
    assert (other_text.described, other_text.grading) == ("", {})
    in_words = Problem.sample(2, with_image=False)
    assert (in_words.text, in_words.image) == (in_words.described, None)
