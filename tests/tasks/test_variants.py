"""Variants of problems: which a problem gets, that they keep its answer, and that hints do not give it away."""

import json
import random
import re
import statistics
from dataclasses import replace

import pytest
from helpers import REAL_DATA, run_config
from PIL import Image, ImageChops, ImageStat

from mm_agrae.config import DataSource
from mm_agrae.config.rollout import VariantsSection
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.grading.accuracy import verify
from mm_agrae.tasks import load_all
from mm_agrae.tasks.picture_operators import PICTURE_OPERATORS
from mm_agrae.tasks.variants import Draw, Problems, hint_steps, holds_answer, next_difficulty
from mm_agrae.types import Example

PICTURE = {operator.name: operator for operator in PICTURE_OPERATORS}


def synthetic(count=1, seed=0, modality="image", **settings):
    task = load_all([DataSource(task="synthetic", split="train", size=20, modality=modality)])
    return Problems(task, VariantsSection(count=count, **settings), seed)


def of_rows(tmp_path, rows, count=1, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_all([DataSource(task="files", path=str(path))])
    return Problems(task, VariantsSection(count=count, **settings), seed=0)


@pytest.mark.parametrize(
    ("before", "success", "eta", "after"),
    [(5, 0.5, 4, 5), (5, 0, 4, 7), (5, 1, 4, 3), (8, 0, 4, 9), (2, 1, 4, 1), (5, 0.25, 2, 5.5), (6, 0, 0, 6)],
)
def test_next_difficulty(before, success, eta, after):
    assert next_difficulty(before, success, eta=eta) == after


def chosen_at(problems, difficulty):
    """The operators of each problem, if all of them were so difficult."""
    rows = range(len(problems.task))
    return [problems.choose(row, replace(problems.task[row], difficulty=difficulty), number=row) for row in rows]


def test_easy_problems_become_harder_and_hard_ones_easier():
    problems = synthetic()
    deltas = {D: [each.delta for (each,) in chosen_at(problems, D) if each] for D in (1.0, 5.0, 9.0)}
    assert set(deltas[1.0]) == {3, 4}  # the target is 9
    assert set(deltas[5.0]) <= {0, 1, 2}  # 6
    assert max(deltas[9.0]) < 0  # 4
    assert min(map(len, deltas.values())) > 15
    several = {
        D: [each.delta for chosen in chosen_at(synthetic(count=3), D) for each in chosen if each] for D in (1.0, 9.0)
    }
    assert statistics.mean(several[1.0]) > 2
    assert statistics.mean(several[9.0]) < 0


@pytest.mark.parametrize("difficulty", [1.0, 4.5, 9.0])
def test_operators_of_a_problem_differ(difficulty):
    problems = synthetic(count=8)
    for chosen in chosen_at(problems, difficulty):
        names = [each.name for each in chosen if each]
        assert len(names) == len(set(names)) >= 1
        assert sum(name.startswith("hint") for name in names) <= 1


def test_a_problem_gets_one_hint(tmp_path):
    solution = "Add 1 to 2. Add 3 to that. Add 4. Add 5 and count. So it is 15."
    rows = [{"question": f"1 + 2 + 3 + 4 + 5? ({n})", "answer": "15", "solution": solution} for n in range(20)]
    for chosen in chosen_at(of_rows(tmp_path, rows, count=8), 9.0):
        assert sum(each is not None for each in chosen) == 1


def test_nothing_fits_a_text_without_a_solution(tmp_path):
    problems = of_rows(tmp_path, [{"question": "1 + 1?", "answer": "2"}], count=2)
    problems.found[0] = 9.0
    draws = problems.draws(0, number=0)
    original = problems.example(draws[0])
    assert (original.variant, original.difficulty) == ("", 9.0)
    assert [problems.example(draw) for draw in draws] == [original] * 3


def test_a_variant_is_a_function_of_what_was_drawn():
    """Of nothing else: not of the variants made before, nor of the object that makes them."""
    draws = [draw for row in range(12) for draw in synthetic(count=3).draws(row, number=100 + row)]
    one, other = synthetic(count=3), synthetic(count=3)
    made = {draw: one.example(draw) for draw in draws}
    assert made == {draw: other.example(draw) for draw in reversed(draws)}
    assert len({example.variant for example in made.values()}) > 6
    later = {draw: one.example(draw._replace(number=draw.number + 20)) for draw in draws}  # an epoch on
    assert {draw.variant for draw in draws if later[draw] != made[draw]} == {1, 2, 3}
    assert sum(later[draw].variant != made[draw].variant for draw in draws) > 9
    assert made != {draw: synthetic(count=3, seed=1).example(draw) for draw in draws}


def test_difficulty_of_a_row_is_that_of_the_problem_moved_by_the_operator():
    problems = synthetic(count=3)
    delta = {each.name: each.delta for row in range(20) for each in problems.operators(row, problems.task[row])}
    seen = set()
    for row, D in enumerate([1.0, 2.25, 5.0, 7.5, 9.0] * 4):
        problems.found[row] = D
        for draw in problems.draws(row, number=row):
            example = problems.example(draw)
            assert draw.difficulty == D
            assert example.difficulty == min(9, max(1, D + (delta[example.variant] if example.variant else 0)))
            assert example.id == problems.task[row].id
            seen.add(example.variant)
    assert len(seen) > 8


def test_success_of_a_problem_moves_its_difficulty():
    problems = synthetic(count=1)
    problems.update([(3, 4, 4), (7, 0, 4), (3, 0, 4), (7, 1, 4)])
    assert problems.found == {3: 5.0, 7: 5 + 4 * (0.5 - 1 / 8)}
    problems.update([(7, 0, 8)])
    assert problems.found[7] == 8.5
    problems.update([(7, 0, 8)])
    assert [draw.difficulty for draw in problems.draws(7, 0)] == [9.0, 9.0]
    assert Problems(problems.task, None, 0).draws(7, 0) == [Draw(7, 0, 0, 5.0)]


# ---------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("answer", "text", "holds"),
    [
        ("12", "3*4=12.", True),
        ("12", "The answer is 12", True),
        ("12", "Thus. 12 it is", True),
        ("12", "That makes $12$ apples, 12cm", True),
        ("12", "In all 120 and 312", False),
        ("12", "It is 1.12 or 12.5", False),
        ("1200", "We get 1,200.", True),
        ("1200", r"We get 1\,200", True),
        ("200", "We get 1,200.", False),
        ("1,200", "We get 1200", True),
        ("-3", "x = - 3", True),
        (r"\frac{1}{2}", r"so x is \frac {1} {2}", True),
        (r"\boxed{7}", "it is 7", True),
        ("x + 1", "is x+1, so", True),
        ("Paris", "It is paris.", True),
        ("Paris", "Parisian", False),
        ("", "Anything", False),
    ],
)
def test_whether_a_hint_holds_the_answer(answer, text, holds):
    assert holds_answer(text, Example("1", "How many?", answer)) is holds


def test_what_the_question_says_is_no_secret_but_the_right_choice_is():
    assert not holds_answer("Is it 12?", Example("1", "Is it 12 or 13?", "12"))
    example = Example("1", "Which? A. 30 B. 45", "B", grading={"kind": "choice", "choices": ["30", "45"]})
    assert holds_answer("So the answer is B.", example)
    assert holds_answer("The angle is 45.", example)
    assert not holds_answer("The other is 30. Be careful.", example)


def test_hints_stop_before_the_answer(tmp_path):
    solution = "Add 3 and 4. That makes 7.\nSo 7 + 5 = 12.\nThe answer is 12."
    problems = of_rows(tmp_path, [{"question": "3 + 4 + 5?", "answer": "12", "solution": solution}])
    (example,) = problems.task
    hints = {each.name: each for each in problems.operators(0, example) if each.name.startswith("hint")}
    assert [name for name, each in hints.items() if each.fits(example)] == ["hint_1", "hint_2"]
    assert [each.delta for each in hints.values()] == [-2, -4, -6, -8]
    made = problems.made(example, hints["hint_2"], Draw(0, 0, 1, 6.0))
    assert made.question.startswith("3 + 4 + 5?\n\nHere are some thoughts")
    assert made.question.endswith("\nAdd 3 and 4.\nThat makes 7.")
    assert (made.answer, made.variant, made.difficulty) == ("12", "hint_2", 2.0)
    assert hint_steps(example, ["It is 12.", "Add."], random.Random(0)) == []


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("question", "fits"),
    [
        ("Find the longest side of the right triangle.", True),
        ("Is ABC a right angle? Is it a right-angled triangle?", True),
        ("How many circles?", True),
        ("What is on the left?", False),
        ("What is right of the triangle?", False),
        ("How tall is the tower?", False),
        ("Which is the leftmost one?", False),
        ("What is written in the rightmost box?", False),
        ("How many rows are there?", False),
        ("Does it go upwards?", False),
        ("Is it turned anticlockwise?", False),
        ("Which bar is highest?", False),
        ("Give the coordinates of A.", False),
        ("Сколько кругов?", False),
        ("有几个圆?", False),
        ("Combien de cercles?", False),
    ],
)
def test_what_may_be_turned(question, fits):
    example = Example("1", question, "4", (Image.new("RGB", (9, 9)),))
    assert PICTURE["rotate"].fits(example) is fits
    assert not PICTURE["rotate"].fits(replace(example, images=()))
    choices = replace(example, grading={"choices": ["above", "inside"]})
    assert not PICTURE["rotate"].fits(choices)


@pytest.mark.parametrize("name", ["noise", "strong_noise"])
def test_noise_is_still_there_when_a_large_picture_has_been_made_smaller(name):
    example = Example("1", "How many?", "4", (Image.new("RGB", (2000, 1400), "grey"),))
    for seed in range(4):
        (made,) = PICTURE[name].make(example, random.Random(seed)).images
        assert made.size == (2000, 1400)
        assert ImageStat.Stat(made.resize((400, 280), Image.Resampling.BICUBIC)).stddev[0] > 10


def test_pictures_are_turned_as_the_question_says():
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (30, 0, 40, 10))  # at the upper right
    example, said = Example("1", "How many?", "1", (picture,)), set()
    for seed in range(40):
        made = PICTURE["rotate"].make(example, random.Random(seed))
        said.add(degrees := int(re.search(r"turned clockwise by (\d+) degrees", made.question)[1]))
        if degrees == 90:
            assert made.images[0].size == (20, 40)
            assert made.images[0].getpixel((15, 35)) == (255, 0, 0)
            assert made.images[0].getpixel((5, 5)) == (255, 255, 255)
    assert said == set(range(30, 360, 30))


def test_what_may_be_written_into_the_picture():
    example = Example("1", "<image>\nFind x.", "4", (Image.new("RGB", (90, 60), "red"),))
    operator = PICTURE["text_in_picture"]
    assert operator.fits(example)
    for text in ("求 x", "<image>", "Find x. " * 100):
        assert not operator.fits(replace(example, question=text))
    assert not operator.fits(replace(example, images=example.images * 2))
    made = operator.make(example, random.Random(0))
    assert made.question == "Answer the question written under the picture."
    (sheet,) = made.images
    below = sheet.crop((0, sheet.width * 60 // 90, *sheet.size))
    assert below.convert("L").getextrema() == (0, 255)
    longer = operator.make(replace(example, question="Find x. " * 60), random.Random(0)).images[0]
    assert longer.height > sheet.height


@pytest.mark.parametrize("size", [(400, 8), (8, 400), (61, 47)])
@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1", "CMYK", "I;16"])
def test_every_operator_takes_every_picture(size, mode):
    source = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("L" if mode == "I;16" else mode)
    source = Image.new("I;16", size, 900) if mode == "I;16" else source
    example = Example("1", "How many?", "4", (source, Image.new("RGB", (30, 30), "white")))
    for operator in PICTURE_OPERATORS:
        if operator.fits(example):
            made = operator.make(example, random.Random(0))
            assert [image.mode for image in made.images] == ["RGB", "RGB"]
            assert (made.answer, len(made.images)) == ("4", 2)
    assert PICTURE["text_in_picture"].make(replace(example, images=(source,)), random.Random(0)).images


def test_a_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    example = Example("1", "How many?", "4", (str(tmp_path / "a.png"),), origin="rows.jsonl, row 7")
    for operator in PICTURE_OPERATORS:
        with pytest.raises(DataError, match=r"rows\.jsonl, row 7.*a\.png"):
            operator.make(example, random.Random(0))


# ---------------------------------------------------------------------- variants of tasks


def test_variants_of_the_synthetic_task_are_the_same_problem():
    problems, words = synthetic(), synthetic(modality="text").task
    seen = set()
    for row, example in enumerate(problems.task):
        for operator in problems.task.variants(row):
            made, name = operator.make(example, random.Random(1)), operator.name
            seen.add((name, example.meta["family"]))
            assert (made.answer, made.grading) == (example.answer, example.grading)
            assert made.meta["key"] == example.meta["key"]
            assert made.meta["numbers"] == example.meta["numbers"]
            if name == "words":
                assert (made.question, made.images) == (words[row].question, ())
            else:
                assert ImageChops.difference(made.images[0], example.images[0]).getbbox()
            numbers = [*map(int, re.findall(r"\d+", made.question))]
            if name == "numbers":
                assert numbers == made.meta["numbers"]
            if name == "picture_only":
                assert len(numbers) == made.question.startswith("Perimeter")
            if name == "redrawn":
                assert made.question == example.question
    assert seen == {
        ("words", "geometry"), ("words", "counting"), ("words", "charts"), ("numbers", "geometry"),
        ("picture_only", "geometry"), ("redrawn", "geometry"), ("redrawn", "counting"),
    }  # fmt: skip
    assert not words.variants(0)


@pytest.mark.skipif(not (REAL_DATA / "mathverse").is_dir(), reason="no data sets; set MM_AGRAE_DATA")
def test_versions_of_mathverse_are_variants():
    source = DataSource(task="mathverse", path=str(REAL_DATA / "mathverse"), split="testmini")
    problems = Problems(load_all([source]), VariantsSection(), seed=0)
    names = set()
    for row, example in enumerate(problems.task):
        version, group = example.columns["problem_version"], example.columns["group"]
        for operator in problems.task.variants(row):
            made = problems.made(example, operator, problems.draws(row, 0)[0])
            assert made.columns["group"] == group
            assert made.columns["problem_version"] == operator.name != version
            assert (made.id, made.variant) == (example.id, operator.name)
            assert verify(example.answer, rf"\boxed{{{made.answer}}}", **example.grading)
            names.add((version, operator.name, operator.delta))
    assert ("Text Dominant", "Vision Intensive", 3) in names
    assert ("Vision Intensive", "Text Lite", -1) in names


# ---------------------------------------------------------------------- settings and files


def test_operators_that_are_not_there():
    with pytest.raises(ConfigError, match=r"rollout\.variants\.operators: no operator 'blurr'; .*blur"):
        synthetic(operators=("blurr",))
    assert synthetic(operators=("words", "blur")).allowed == {"words", "blur"}
    for chosen in chosen_at(synthetic(count=4, operators=("blur", "noise")), 1.0):
        assert {each.name for each in chosen if each} == {"blur", "noise"}


def test_a_step_holds_whole_problems():
    with pytest.raises(ConfigError, match=r"prompts_per_step is 16, no multiple of 3, .* use 15"):
        run_config("run", rollout={"prompts_per_step": 16, "variants": {"count": 2}})
    servers = {"engine": "vllm_server", "vllm": {"servers": ["http://127.0.0.1:1"]}, "overlap": True}
    with pytest.raises(ConfigError, match=r"rollout\.overlap and rollout\.variants exclude each other"):
        run_config("run", rollout=servers | {"variants": {}})


ROWS = [{"id": "a", "question": "3 + 4?", "answer": "7"}, {"id": "b", "question": "5 + 5?", "answer": "10"}]
WORDING = "What do 3 and\u2028 4 make?"


def prepared(tmp_path, *lines, **settings):
    path = tmp_path / "prepared.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return of_rows(tmp_path, ROWS, prepared=str(path), **settings)


def test_wordings_and_steps_of_a_file(tmp_path):
    line = json.dumps({"id": "a", "wordings": [WORDING], "steps": ["Add 3 and 4."]}, ensure_ascii=False)
    problems = prepared(tmp_path, line, {"id": "of no row"}, "", count=2)
    problems.found = {0: 8.0, 1: 8.0}
    made = {problems.example(draw).variant: problems.example(draw).question for draw in problems.draws(0, 0)}
    assert made["hint_1"].endswith("\nAdd 3 and 4.")
    assert made[""] == "3 + 4?"
    reword = next(each for each in problems.operators(0, problems.task[0]) if each.name == "reword")
    assert problems.made(problems.task[0], reword, Draw(0, 0, 1, 8.0)).question == WORDING
    assert {problems.example(draw).variant for draw in problems.draws(1, 0)} == {""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "each line is"),
        ('{"wordings": []}', "KeyError"),
        ('{"id": 7}', "lists of texts"),
        ('{"id": "b", "wordings": "text"}', "lists of texts"),
        ('{"id": "b", "wordings": [7]}', "lists of texts"),
        ('{"id": "b", "steps": null}', "each line is"),
        ('{"id": "b", "steps": ["Add.", "So the sum is 10."]}', r"a step holds the answer '10'; remove it"),
        ('{"id": "b", "wordings": ["<image> 5 + 5?"]}', "other image markers than the question"),
        ('{"id": "b", "wordings": [" "]}', "lacks text"),
    ],
)
def test_files_that_do_not_fit(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"prepared\.jsonl, line 2: .*{message}"):
        prepared(tmp_path, {"id": "a", "wordings": [WORDING]}, line)


def test_files_that_say_nothing(tmp_path):
    with pytest.raises(DataError, match=r"prepared\.jsonl: has no id of a training row"):
        prepared(tmp_path, {"id": "c"})
    with pytest.raises(DataError, match="No such file"):
        of_rows(tmp_path, ROWS, prepared=str(tmp_path / "nowhere.jsonl"))
