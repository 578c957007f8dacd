"""The synthetic task: exact answers, images that agree with them, splits that do not touch."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from helpers import equations_hold

from mm_agrae.errors import ConfigError
from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES, derive
from mm_agrae.tasks.synthetic.problems import numbers_of
from mm_agrae.tasks.synthetic.task import FAMILIES, LEVELS, SPLITS, SyntheticTask


def measured_angle(points, vertex, p, q) -> float:
    """Counter-clockwise from vertex-p to vertex-q on a page whose y axis points down, degrees."""
    first = complex(points[p][0] - points[vertex][0], points[vertex][1] - points[p][1])
    second = complex(points[q][0] - points[vertex][0], points[vertex][1] - points[q][1])
    turn = second / first
    return math.degrees(math.atan2(turn.imag, turn.real)) % 360


def length(points, p, q) -> float:
    return abs(complex(*points[p]) - complex(*points[q]))


def geometry_answer(example) -> float:
    """The answer as a ruler and a protractor find it in the drawing; labels checked on the way."""
    drawn = example.meta["drawn"]
    points, answer = drawn["points"], None
    for vertex, p, q, text in drawn["angles"]:
        degrees = measured_angle(points, vertex, p, q)
        if text == "x":
            answer = degrees
        else:
            assert degrees == pytest.approx(int(text), abs=1e-6), example
    for vertex, p, q in drawn["right"]:
        turn = measured_angle(points, vertex, p, q)
        assert min(turn, 360 - turn) == pytest.approx(90)
    assert len({round(length(points, p, q), 6) for p, q in drawn["ticks"]}) <= 1
    for (p, q, _), (r, s, _) in itertools.pairwise(drawn["arrows"]):
        one = complex(*points[q]) - complex(*points[p])
        other = complex(*points[s]) - complex(*points[r])
        assert (one / other).imag == pytest.approx(0, abs=1e-9)
    if drawn["sides"]:
        unit = {length(points, p, q) / int(t) for p, q, t in drawn["sides"] if t != "x"}
        assert max(unit) == pytest.approx(min(unit))
        unit = min(unit)
        perimeter = sum(length(points, p, q) for p, q in drawn["segments"]) / unit
        if "perimeter" in example.question.lower():
            answer = perimeter
        if "Perimeter" in example.question:
            assert perimeter == pytest.approx(example.meta["numbers"][0])
            answer = next(length(points, p, q) / unit for p, q, t in drawn["sides"] if t == "x")
    assert answer is not None
    return answer


def components(mask: np.ndarray) -> int:
    """Connected patches of True, by flood fill."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
    return count


def counting_answer(example) -> str:
    shapes = example.meta["drawn"]["shapes"]
    n = Counter(shape["kind"] for shape in shapes)
    first, second, third = example.meta["kinds"]
    match example.meta["ask"]:
        case "how_many":
            return str(n[first])
        case "more":
            return str(n[first] - n[second])
        case "together":
            return str(n[first] + n[second])
        case "compare":
            return "C" if n[first] == n[second] else "A" if n[first] > n[second] else "B"
        case "not":
            return str(n[second] + n[third])
        case "red":
            return str(sum(s["kind"] == first and s["colour"] == "red" for s in shapes))
    raise AssertionError(example.meta["ask"])


def charts_answer(example) -> str:
    """From the coloured pixels alone: a bar's height in units of the scale."""
    drawn = example.meta["drawn"]
    pixels = np.asarray(example.images[0]).astype(int)
    heights = {}
    for bar in drawn["bars"]:
        same = (np.abs(pixels - np.array(bar["colour"])).sum(-1) < 6).any(1)
        heights[bar["name"]] = round(float(same.sum()) / drawn["unit"])
    values = list(heights.values())
    match example.meta["ask"]:
        case "value":
            return str(heights[example.meta["bars"][0]])
        case "difference":
            top, bottom = example.meta["bars"]
            return str(heights[top] - heights[bottom])
        case "highest":
            return max(heights, key=heights.__getitem__)
        case "lowest":
            return min(heights, key=heights.__getitem__)
        case "sum":
            return str(sum(values))
        case "without":
            return str(sum(sorted(values)[:-1]))
    raise AssertionError(example.meta["ask"])


@pytest.mark.parametrize("split", SPLITS)
def test_answers_agree_with_what_is_drawn(split: str) -> None:
    task = SyntheticTask(split, size=1500, seed=3)
    for example in (task[index] for index in range(len(task))):
        family = example.meta["family"]
        if family == "geometry":
            assert geometry_answer(example) == pytest.approx(float(example.answer), abs=1e-6)
        elif family == "counting":
            assert counting_answer(example) == example.answer
        else:
            assert charts_answer(example) == example.answer


def test_every_problem_of_every_figure_measures_right() -> None:
    """All the numbers a figure can have, not a sample of them."""
    rng = random.Random(0)
    for figure in FIGURES.values():
        for level, split in itertools.product(figure.levels, SPLITS):
            for numbers in numbers_of(figure.name, level, split):
                diagram = figure.build(rng, *numbers)
                points = {name: (x, -y) for name, (x, y) in diagram.points.items()}
                for vertex, p, q, text in diagram.angles:
                    expected = derive(figure.ways[0], numbers)[1] if text == "x" else int(text)
                    assert measured_angle(points, vertex, p, q) == pytest.approx(expected)


def test_every_way_leads_to_the_answer_by_true_equations() -> None:
    task = SyntheticTask(size=4000, seed=1)
    several = 0
    for index in range(len(task)):
        problem, _ = task.problem(index)
        several += len(problem.ways) > 1
        for way in problem.ways:
            equations_hold(way)
            if not problem.choices:
                assert re.findall(r"\d+", way)[-1] == problem.answer, (way, problem.answer)
    assert several > 800


def test_shapes_are_as_many_in_the_image_as_in_the_facts() -> None:
    task = SyntheticTask(size=150, families=["counting"], seed=2)
    for example in (task[index] for index in range(len(task))):
        shapes = example.meta["drawn"]["shapes"]
        dark = np.asarray(example.images[0].convert("L")) < 200
        assert components(dark) == len(shapes)
        pixels = np.asarray(example.images[0])
        for shape in shapes:
            x, y, radius = int(shape["x"]), int(shape["y"]), shape["radius"]
            assert tuple(pixels[y, x]) == drawing.COLOURS[shape["colour"]]
            box = dark[int(y - radius) : int(y + radius) + 2, int(x - radius) : int(x + radius) + 2]
            rows, columns = np.nonzero(box)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            filled = len(rows) / (height * width)
            # A square fills its frame, a disc pi/4 of it, a triangle a half.
            nearest = min(
                (abs(filled - share), kind) for kind, share in (("square", 1), ("circle", 0.785), ("triangle", 0.5))
            )
            assert nearest[1] == shape["kind"]


def test_labels_are_free_of_lines_and_each_other() -> None:
    task = SyntheticTask(size=1500, families=["geometry"], seed=4)
    crowded = 0
    for example in (task[index] for index in range(len(task))):
        drawn = example.meta["drawn"]
        boxes = [box for _, box in drawn["labels"]]
        texts = sorted(text for text, _ in drawn["labels"])
        assert texts == sorted([t for *_, t in drawn["angles"]] + [t for *_, t in drawn["sides"]])
        lines = [(drawn["points"][p], drawn["points"][q]) for p, q in drawn["segments"]]
        crowded += (
            any(drawing.overlap(a, b) for a, b in itertools.combinations(boxes, 2))
            or any(drawing.crosses(box, *line) for box in boxes for line in lines)
            or any(min(box) < 0 or max(box) > 112 for box in boxes)
        )
    assert crowded == 0


def content_hash(example) -> bytes:
    digest = hashlib.sha256(example.question.encode())
    for image in example.images:
        digest.update(image.tobytes())
    return digest.digest()


def test_no_problem_stands_in_two_splits() -> None:
    """By problem, whatever the modality, level or seed."""
    owner: dict[str, str] = {}
    for split in SPLITS:
        for modality, seed in itertools.product(("image", "text"), (0, 7)):
            task = SyntheticTask(split, modality, size=3000, seed=seed)
            for index in range(len(task)):
                problem, _ = task.problem(index)
                # Not problem.key, but what makes a problem, whatever the order of its numbers.
                same = f"{problem.family} {sorted(problem.numbers)}"
                assert owner.setdefault(same, split) == split
    assert set(Counter(owner.values())) == set(SPLITS)


def test_no_image_or_text_stands_in_two_splits() -> None:
    owner: dict[bytes, str] = {}
    for split in SPLITS:
        for modality in ("image", "text"):
            task = SyntheticTask(split, modality, size=1200)
            for index in range(len(task)):
                assert owner.setdefault(content_hash(task[index]), split) == split


def test_every_figure_has_problems_at_each_level_in_each_split() -> None:
    for figure in FIGURES.values():
        for level, split in itertools.product(figure.levels, SPLITS):
            assert numbers_of(figure.name, level, split), (figure.name, level, split)


def test_items_are_a_function_of_seed_split_and_index() -> None:
    for modality in ("image", "text"):
        one, two = SyntheticTask("test", modality), SyntheticTask("test", modality)
        for index in (0, 5, 3, 511):
            assert content_hash(one[index]) == content_hash(two[index])
            assert one[index].answer == two[index].answer
        assert content_hash(one[-1]) == content_hash(one[len(one) - 1])
        other = SyntheticTask("test", modality, seed=1)
        assert sum(one[k].question == other[k].question for k in range(50)) < 25
    with pytest.raises(IndexError):
        one[len(one)]


def test_text_and_image_pose_the_same_problems() -> None:
    image, text = SyntheticTask(size=400), SyntheticTask(size=400, modality="text")
    for index in range(400):
        drawn, told = image[index], text[index]
        assert (drawn.meta["key"], drawn.answer) == (told.meta["key"], told.answer)
        assert drawn.grading == told.grading
        assert len(drawn.images) == 1
        assert not told.images
        assert drawn.images[0].mode == "RGB"
        assert drawn.images[0].size == (112, 112)
        if drawn.meta["family"] != "counting":
            missing = Counter(told.meta["numbers"]) - Counter(map(int, re.findall(r"\d+", told.question)))
            assert not missing


@pytest.mark.parametrize(("levels", "most"), [([1, 2, 3], 0.68), ([4], 0.2)])
def test_the_image_is_needed(levels: list[int], most: float) -> None:
    """Who knows the best answer to each question by heart still fails without the image."""
    task = SyntheticTask(size=6000, families=["geometry"], levels=levels)
    answers = defaultdict(Counter)
    for index in range(len(task)):
        problem, _ = task.problem(index)
        answers[problem.question][problem.answer] += 1
        if problem.level == 4 and not problem.question.startswith("Perimeter"):
            assert not re.search(r"\d", problem.question)
    by_heart = sum(found.most_common(1)[0][1] for found in answers.values())
    assert by_heart / len(task) < most


def test_choices_hold_the_answer() -> None:
    task = SyntheticTask(size=1500, families=["counting", "charts"])
    kinds = Counter()
    for example in (task[index] for index in range(len(task))):
        kinds[example.grading["kind"]] += 1
        if example.grading["kind"] == "choice":
            assert "ABC".index(example.answer) < len(example.grading["choices"])
        else:
            assert example.answer.isdigit()
    assert min(kinds.values()) > 200


def test_families_and_levels_can_be_chosen() -> None:
    for family, level in itertools.product(FAMILIES, LEVELS):
        task = SyntheticTask(families=[family], levels=(level,), size=20)
        assert {task[k].meta["family"] for k in range(20)} == {family}
        assert {task[k].meta["level"] for k in range(20)} == {level}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tests"}, "did you mean 'test'"),
        ({"modality": "img"}, "modality is 'img'"),
        ({"families": ["geometri"]}, "did you mean 'geometry'"),
        ({"families": []}, "families is empty"),
        ({"levels": [5]}, "levels is 5; valid: 1, 2, 3, 4"),
        ({"size": 0}, "size is 0"),
        ({"picture_px": 64}, "picture_px is 64"),
    ],
)
def test_a_wrong_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SyntheticTask(**options)
