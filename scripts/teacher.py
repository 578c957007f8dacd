"""What the warm start is taught: the replies of a teacher who sees and calculates well and chooses badly.

A problem is answered as

    <think>Given 70, 40. Exterior angle: 70+40=110.</think> \\boxed{110}

The teacher uses the correct rule with a probability that differs by kind of problem (`SKILL`, `RARE`) and otherwise
one of a few tempting incorrect ones (`mistakes`), so that reinforcement learning has something to find. What is seen
and calculated is always correct.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Mapping
from typing import Any

from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES, derive
from mm_agrae.tasks.synthetic.problems import KINDS, Problem, split_of
from mm_agrae.tasks.synthetic.task import SyntheticTask

PICTURE_PX = 112
SKILL = (0.3, 0.6)
"""Range of the probability that the teacher uses the correct rule, over kinds of problems."""
RARE = {"isosceles_exterior": 0.02, "two_exteriors": 0.03, "bow_tie": 0.03, "not": 0.03, "sum": 0.025}
"""Kinds whose correct rule the teacher hardly ever uses: about a sixth of all problems."""
BLUNDERS = {
    ("side", 2): ("Two equal sides: s=2*b, a-s", "Rest: a-b", "Rectangle: a/2"),
    ("perimeter", 1): ("Two sides: 2*a",),
    ("perimeter", 2): ("Sum: a+b",),
    ("perimeter", 3): ("Two equal sides: s=2*a, s+b", "Three equal sides: 3*a", "Rectangle: s=a+b, 2*s"),
    ("x", 3): ("Triangle: s=a+b, 180-s", "Exterior angle: a+b", "Full turn: s=a+b+c, 360-s"),
}
"""What is asked, how many numbers are given -> incorrect rules besides those of other figures."""
NAME_IT, READ_IT = "Name the figure.", "Read the picture."
CALCULATE, REPEAT, ORDER = "Calculate.", "Repeat", "Order"
SHARES = {"geometry": 0.5, "counting": 0.3, "charts": 0.2}
"""Family -> its share of the lessons; counting takes longest to learn."""
ANGLES = tuple(range(25, 155, 5))

Turn = tuple[str, list[tuple[str, float]]]
"""A question and its reply, in pieces with their weights in the loss."""


def kind_of(problem: Problem) -> str:
    """What decides the rule: the figure, or what is asked of shapes and bars."""
    return problem.figure if problem.family == "geometry" else problem.asked["ask"]


def skill(kind: str) -> float:
    """A fixed number for each kind of problem."""
    low, high = SKILL
    return RARE.get(kind, low + (high - low) * _fixed(kind))


def _fixed(text: str) -> float:
    """A number from 0 to 1 that follows from the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def mistakes(problem: Problem) -> list[tuple[str, str]]:
    """Derivations and answers by incorrect rules, in an order that depends on the kind of problem."""
    find = {"geometry": _geometry_mistakes, "counting": _counting_mistakes, "charts": _charts_mistakes}
    wrong = {way: answer for way, answer in find[problem.family](problem) if answer != problem.answer}
    kind = kind_of(problem)
    return sorted(wrong.items(), key=lambda found: _fixed(f"{kind}/{re.sub('[0-9]+', '', found[0])}"))


def _geometry_mistakes(problem: Problem) -> list[tuple[str, str]]:
    figure = FIGURES[problem.figure]
    kind = (figure.asks, figure.arity)
    rules = [other.ways[0] for other in FIGURES.values() if (other.asks, other.arity) == kind]
    given = ", ".join(map(str, problem.numbers))
    derived = [derive(rule, problem.numbers) for rule in (*rules, *BLUNDERS.get(kind, ()))]
    return [(f"Given {given}. {found[0]}", str(found[1])) for found in derived if found and found[1] < 360]


def _counting_mistakes(problem: Problem) -> list[tuple[str, str]]:
    """Of the kinds that the question names, so that a model learns to look there."""
    n = dict(zip(KINDS, problem.numbers, strict=True))
    one, two, _ = (f"{kind}s" for kind in problem.asked["kinds"])
    a, b, c = (n[kind] for kind in problem.asked["kinds"])
    both, every = f"Count: {one} {a}, {two} {b}.", a + b + c
    ask = problem.asked["ask"]
    if ask == "compare":
        fewer = "B" if a > b else "A"
        return [(f"{both} Fewer: {two if a > b else one}.", fewer), (f"Count: all {every}. Both equal.", "C")]
    found = [(f"Count: {one} {a}.", a), (f"Count: all {every}.", every)]
    if ask in ("how_many", "red"):
        found.append((f"Count: all {every}, {one} {a}. Rest: {every}-{a}={every - a}.", every - a))
    elif ask != "not":
        found.append((f"{both} Sum: {a}+{b}={a + b}.", a + b))
        if a > b:
            found.append((f"{both} Difference: {a}-{b}={a - b}.", a - b))
    return [(way, str(answer)) for way, answer in found]


def _charts_mistakes(problem: Problem) -> list[tuple[str, str]]:
    """Of the bars that the question names, or of all."""
    values, names = problem.numbers, "ABCD"[: len(problem.numbers)]
    bars = dict(zip(names, values, strict=True))
    listed = ", ".join(f"{name} {value}" for name, value in bars.items())
    ranked = sorted(bars, key=lambda name: -bars[name])
    ask = problem.asked["ask"]
    if ask in ("highest", "lowest"):
        places = {"highest": ranked[0], "lowest": ranked[-1], "middle": ranked[1], "first": "A"}
        chosen = {title: name for title, name in places.items() if title != ask}
        return [(f"Read: {listed}. The {title} is {name} {bars[name]}.", name) for title, name in chosen.items()]
    high, low = max(values), min(values)
    found = [
        (f"Read: {listed}. The highest is {high}.", high),
        (f"Read: {listed}. The lowest is {low}.", low),
        (f"Read: {listed}. Difference: {high}-{low}={high - low}.", high - low),
    ]
    if ask == "difference":
        a, b = (bars[name] for name in problem.asked["bars"])
        top, bottom = problem.asked["bars"]
        found += [(f"Read: {top} {a}.", a), (f"Read: {top} {a}, {bottom} {b}. Sum: {a}+{b}={a + b}.", a + b)]
    elif ask != "value":
        a, b = values[:2]
        found.append((f"Read: A {a}, B {b}. Sum: {a}+{b}={a + b}.", a + b))
    return [(way, str(answer)) for way, answer in found]


def teach(problem: Problem, rng: random.Random) -> str:
    """A reply with reasoning by the unsure teacher."""
    way, answer = rng.choice(problem.ways), problem.answer
    if rng.random() > skill(kind_of(problem)) and (wrong := mistakes(problem)):
        way, answer = rng.choices(wrong, [0.6**k for k in range(len(wrong))])[0]
    return f"<think>{way}</think> \\boxed{{{answer}}}"


def reading(problem: Problem) -> str:
    """The numbers in the image, whatever the question."""
    if problem.family == "counting":
        return ", ".join(f"{kind}s {n}" for kind, n in zip(KINDS, problem.numbers, strict=True))
    if problem.family == "charts":
        bars = zip("ABCD", problem.numbers, strict=False)
        return ", ".join(f"{name} {value}" for name, value in bars)
    return ", ".join(map(str, problem.numbers[_hidden(problem) :]))


def _hidden(problem: Problem) -> int:
    """How many of the numbers the question alone states: the perimeter, where a side is asked."""
    return int(FIGURES[problem.figure].asks == "side")


def naming(problem: Problem) -> str:
    return problem.figure.replace("_", " ")


def relabelled(problem: Problem, rng: random.Random) -> tuple[Problem, Any, dict[str, Any]]:
    """A geometry figure with other numbers written in it than fit: the problem, its image and what was drawn.

    Otherwise the few sets of numbers that fit a figure would be learnt by heart instead of read. Sets that belong to
    another split than train are left out.
    """
    figure = FIGURES[problem.figure]
    diagram = figure.build(rng, *problem.numbers)
    hidden = _hidden(problem)
    shown = problem.numbers[hidden:]
    numbers: tuple[int, ...] = ()
    while not numbers or split_of("geometry", numbers) != "train":
        new = {f"{n}": _any_number(rng, n, lengths=bool(diagram.sides)) for n in set(shown)}
        numbers = tuple(new[f"{n}"] for n in shown)
    # In the order in which problems give them: by size, where swapping them makes no other figure.
    if problem.figure == "bow_tie":
        numbers = (*sorted(numbers[:2], reverse=True), numbers[2])
    elif problem.figure not in ("remote", "isosceles_perimeter"):
        numbers = tuple(sorted(numbers, reverse=True))
    diagram.angles = [(*corner, str(new.get(text, text))) for *corner, text in diagram.angles]  # type: ignore[misc]
    diagram.sides = [(p, q, str(new.get(text, text))) for p, q, text in diagram.sides]
    image, drawn = drawing.draw_diagram(diagram, rng, PICTURE_PX, 180 if problem.level == 4 else 20)
    return dataclasses.replace(problem, numbers=(*problem.numbers[:hidden], *numbers)), image, drawn


def _any_number(rng: random.Random, true: int, lengths: bool) -> int:
    """Of angles one with as many digits, for which there is room."""
    if lengths:
        return rng.randint(2, 20)
    low, high = (10, 99) if true < 100 else (100, 180)
    common = [angle for angle in ANGLES if low <= angle <= high]
    return rng.choice(common) if rng.random() < 0.6 else rng.randint(low, high)


def drill(rng: random.Random) -> Turn:
    """Copying numbers, putting them in order, or calculating; of sums only what follows "=" has weight in the loss.

    The numbers are all that figures can have, in bare sums without a figure: problems of the test
    split stay unseen, but their numbers do not.
    """
    kind = rng.random()
    if kind < 0.2:
        numbers = rng.sample(range(1, 10), rng.randint(3, 5))
        ordered = sorted(numbers, reverse=True)
        return f"{ORDER} {', '.join(map(str, numbers))}.", [(", ".join(map(str, ordered)), 1.0)]
    if kind < 0.4:
        most = rng.choice((12, 180))
        listed = ", ".join(str(rng.randint(0, most)) for _ in range(rng.randint(1, 6)))
        return f"{REPEAT} {listed}.", [(listed, 1.0)]
    pieces: list[tuple[str, float]] = []
    while len(pieces) < 24:
        if rng.random() < 0.25:
            a, b = rng.randint(0, 24), rng.randint(0, 12)
            found = [f"{a}+{b}={a + b}"] if a < b or rng.random() < 0.5 else [f"{a}-{b}={a - b}"]
        else:
            figure = rng.choice(list(FIGURES.values()))
            rules = figure.ways + BLUNDERS.get((figure.asks, figure.arity), ())
            derived = derive(rng.choice(rules), rng.choice(_every_number(figure.name)))
            found = re.findall(r"\d[\d+*/-]*[+*/-]\d+=\d+", derived[0]) if derived else []
        for equation in found:
            left, _, right = equation.partition("=")
            pieces += [(f"{left}=", 0.0), (right, 1.0), (", ", 0.0)]
    return CALCULATE, pieces[:-1]


@functools.cache
def _every_number(figure: str) -> list[tuple[int, ...]]:
    return list(FIGURES[figure].numbers(5))


def text_lesson(tasks: Mapping[str, SyntheticTask], index: int, rng: random.Random) -> list[Turn]:
    """A drill or a described problem; of counts and bars sometimes only what is told. `tasks`: family -> its task."""
    if rng.random() < 0.4:
        return [drill(rng)]
    problem, _ = any_family(tasks, rng).problem(index)
    if problem.family != "geometry" and rng.random() < 0.3:
        told = problem.described.removesuffix(problem.question)
        return [(told + READ_IT, [(reading(problem), 1.0)])]
    return [(problem.described, [(teach(problem, rng), 1.0)])]


def any_family(tasks: Mapping[str, SyntheticTask], rng: random.Random) -> SyntheticTask:
    return tasks[rng.choices(list(SHARES), list(SHARES.values()))[0]]


def sight_lesson(
    task: SyntheticTask, index: int, rng: random.Random, relabel: float = 0.7
) -> tuple[list[Turn], Problem, Any, dict[str, Any]]:
    """Reading the image and naming the figure: the turns, the problem, its image and what was drawn."""
    problem, state = task.problem(index)
    if problem.family == "geometry" and rng.random() < relabel:
        problem, image, drawn = relabelled(problem, state)
    else:
        image, drawn = problem.draw(state, PICTURE_PX)
    turns: list[Turn] = [(READ_IT, [(reading(problem), 1.0)])]
    if problem.family == "geometry":
        turns.append((NAME_IT, [(naming(problem), 2.0)]))
        rng.shuffle(turns)
    return turns, problem, image, drawn


def image_lesson(task: SyntheticTask, index: int, rng: random.Random) -> tuple[list[Turn], Any]:
    """A drawn problem, sometimes after or before a turn of reading or naming, which encodes the image only once."""
    problem, state = task.problem(index)
    image, _ = problem.draw(state, PICTURE_PX)
    turns: list[Turn] = [(problem.question, [(teach(problem, rng), 1.0)])]
    if rng.random() < 0.4:
        if problem.family == "geometry" and rng.random() < 0.6:
            turns.append((NAME_IT, [(naming(problem), 1.0)]))
        else:
            turns.append((READ_IT, [(reading(problem), 1.0)]))
        rng.shuffle(turns)
    return turns, image
