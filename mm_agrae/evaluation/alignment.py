"""`mm-agrae difficulty`: what models say of an item's difficulty, and whether they solve it, against a human label.

Every model reads every item twice for each proficiency, decoding greedily: as an actor it answers, as an observer it
sees the gold answer and rates the difficulty for students (arXiv 2512.18880). A rating is what stands in the reply's
last box; what is not on the scale counts as not read. `difficulty.py` has the statistics.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mm_agrae import config as configs
from mm_agrae.config import Config, DataSource
from mm_agrae.errors import ConfigError, nearest
from mm_agrae.evaluation import difficulty
from mm_agrae.evaluation.difficulty import ensemble, mean, pass_rate, spearman, with_interval
from mm_agrae.evaluation.evaluate import EvaluatedProblem, Scorer, build_engine, distinct_names, run, write
from mm_agrae.grading.extraction import extract_answer
from mm_agrae.model.processing import Processing
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import Engine
from mm_agrae.run.files import write_jsonl
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.problems import problem_success, write_problems
from mm_agrae.run.records import SampleRecord
from mm_agrae.run.versions import versions
from mm_agrae.tasks import load_all
from mm_agrae.types import Completion, Example, Score

PROFICIENCIES = {
    "none": "",
    "low": "You are a weak student with little command of this subject. Think and answer as one.",
    "average": "You are an average student with a fair command of this subject. Think and answer as one.",
    "high": "You are a good student with a high command of this subject. Think and answer as one.",
}
WORDS = {"easy": 1.0, "medium": 2.0, "hard": 3.0}
LOWEST, HIGHEST = 1.0, 100.0
"""The scale of observers, unless the label is in words."""
_SCALES = {True: ", ".join(WORDS), False: f"a number from {LOWEST:g} (very easy) to {HIGHEST:g} (very hard)"}
_OBSERVE = """{question}

The correct answer is {answer}. Do not answer the question. Analyse step by step how difficult it is for students, \
and put your final rating, {scale}, into \\boxed{{}}."""


def label_value(value: Any, where: str = "label") -> float | None:
    """A human difficulty: a number, or easy, medium or hard; None if there is none. Raises ConfigError otherwise."""
    text = str(value).strip().lower()
    if value is None or text in ("", "nan"):
        return None
    with contextlib.suppress(ValueError):
        number = WORDS[text] if text in WORDS else float(text)
        if np.isfinite(number) and not isinstance(value, bool):
            return number
    raise ConfigError(
        f"{where} is {value!r}, neither a number nor one of {', '.join(WORDS)}; name another with --label"
    )


def rating_in(reply: str, words: bool) -> float | None:
    """The rating in the last box of an observer's reply; None if it is not on the scale."""
    boxed = extract_answer(reply, answer_in=("boxed",)) or ""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{(.*)\}", r"\1", boxed).strip(" $.").lower()
    if words:
        return WORDS.get(text)
    number = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else np.nan
    return number if LOWEST <= number <= HIGHEST else None


@dataclass
class _RatingReader:
    """In the place of a `Rewarder`: a reply succeeds if a rating is read from it, which is its part `rating`."""

    words: bool

    def score(self, examples: Sequence[Example], completions: Sequence[Completion], stop: bool = False) -> list[Score]:
        found = [rating_in(completion.text, self.words) for completion in completions]
        return [Score(value or 0.0, value is not None, {} if value is None else {"rating": value}) for value in found]


class _ItemSet:
    """The items of an evaluation set that have a label, and what the examinees (model, proficiency) make of them."""

    def __init__(self, source: DataSource, config: Config, label: str):
        self.name, self.config, self.label = source.label, config, label
        task = load_all([source], on_bad_row=config.data.on_bad_row)
        every = [task[index] for index in range(len(task))]
        values = [each.meta.get(label, each.columns.get(label)) for each in every]
        numbers = [label_value(value, f"{e.origin or e.id}: {label}") for e, value in zip(every, values, strict=True)]
        self.examples = [each for each, number in zip(every, numbers, strict=True) if number is not None]
        self.human_N = np.array([number for number in numbers if number is not None])
        if not self.examples:
            columns = {name for each in every[:1] for name in (*each.meta, *each.columns)} or {"none"}
            raise ConfigError(f"data {self.name!r}: no row has a {label!r}; {nearest(label, columns)}")
        self.words = {str(value).strip().lower() for value in values} & WORDS.keys() != set()
        self.replies: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        """(model, proficiency) -> [N] whether it solved each item, and its rating of each; NaN for none."""

    def ask(
        self, engine: Engine, processing: Processing, scorer: Scorer, persona: str, on_progress: Callable[[int], None]
    ) -> list[EvaluatedProblem]:
        """One greedy reply to each item: to its question or, if the scorer reads ratings, how difficult it is."""
        examples, prompt = [], self.config.prompt
        for each in self.examples:
            question = each.question
            if isinstance(scorer, _RatingReader):
                question = _OBSERVE.format(question=question, answer=each.answer, scale=_SCALES[self.words])
            system = "\n\n".join(filter(None, (each.system or prompt.system, persona)))
            examples.append(replace(each, question=question, system=system))
        if isinstance(scorer, _RatingReader):  # what the config asks of answers is not asked of ratings
            processing = copy.copy(processing)
            processing.settings = prompt.model_copy(update={"instruction": ""})
        section, bad = self.config.evaluate, self.config.data.on_bad_row
        every = range(len(examples))
        return run(engine, processing, scorer, examples, every, section, on_bad_row=bad, on_progress=on_progress)

    def column(self, values: Mapping[int, float | None]) -> np.ndarray:
        """[N] values by the index of their item."""
        return np.array([values.get(index) for index in range(len(self.examples))], dtype=float)

    def statistics(self) -> dict[str, Any]:
        """Everything that is reported, with null for what is not defined.

        The Rasch model and what is said of all models are of those without a proficiency, or with the first one.
        """
        human_N, section = self.human_N, self.config.evaluate
        interval = partial(with_interval, bootstrap=section.bootstrap, seed=section.seed)
        models, levels = ([*dict.fromkeys(key[i] for key in self.replies)] for i in range(2))
        correct_MN, rating_MN = (np.stack([self.replies[model, levels[0]][i] for model in models]) for i in range(2))
        fitted, solved_N, rating_N = difficulty.rasch(correct_MN), pass_rate(correct_MN), ensemble(rating_MN)
        rho_M = np.array([spearman(each, human_N) for each in rating_MN], dtype=float)
        best_first = rating_MN[np.argsort(-rho_M, kind="stable")]
        examinees = []
        for (model, level), (correct, rating) in self.replies.items():
            m = models.index(model)
            examinees.append(
                {
                    "name": _shown(model, level),
                    "read": float(np.isfinite(rating).mean()),
                    "spearman": interval(spearman, rating, human_N),
                    "auroc": interval(difficulty.auroc, rating, 1 - correct),
                    "accuracy": interval(mean, correct),
                    "ability": fitted.ability_M[m] if level == levels[0] else None,
                    "ability_error": fitted.ability_error_M[m] if level == levels[0] else None,
                }
            )
        if len(levels) > 1:
            for model in models:
                every = ensemble(np.stack([self.replies[model, level][1] for level in levels]))
                rho, read = interval(spearman, every, human_N), float(np.isfinite(every).mean())
                examinees.append({"name": f"{model} (mean)", "read": read, "spearman": rho})
        pool = {"failure": interval(lambda v, y: spearman(-pass_rate(v), y), correct_MN, human_N)}
        for rate in ("saturated", "savant", "brittle"):
            pool[rate] = interval(lambda v, y, rate=rate: difficulty.rates(v, y)[rate], correct_MN, human_N)
        by_label = [(y, human_N == y) for y in np.unique(human_N)]
        return {
            "label": self.label,
            "items": len(human_N),
            "examinees": examinees,
            "best_models": [spearman(ensemble(best_first[:k]), human_N) for k in range(1, len(models) + 1)],
            "pool": pool,
            "levels": [(y, int(at.sum()), interval(mean, solved_N[at]), mean(rating_N[at])) for y, at in by_label],
            "table": {
                "example_id": [each.id for each in self.examples],
                "label": human_N,
                "solved": solved_N,
                "difficulty": fitted.difficulty_N,
                "difficulty_error": fitted.difficulty_error_N,
                "rating": rating_N,
            },
        }


def measure(
    models: Sequence[str], paths: Sequence[str], config: Config, out: Path, label: str, rating: str, proficiency: str
) -> int:
    """Ask each model, which lies in its path; write results and replies to `out` and print tables.

    `out` gets an evaluation of every actor, `observers.jsonl` with the observers' replies, and in `difficulty.json`
    the statistics of each evaluation set. Returns the exit status. Raises ConfigError if there is nothing to measure.
    """
    levels = proficiency.split(",")
    for level in levels:
        if level not in PROFICIENCIES:
            raise ConfigError(f"--proficiency: no {level!r}; {nearest(level, PROFICIENCIES)}")
    if not config.data.evaluate:
        raise ConfigError("data.evaluate is empty; add data with a label of difficulty")
    one_pass = config.evaluate.model_copy(update={"samples": 1, "temperature": 0.0, "greedy": False})
    config = config.model_copy(update={"evaluate": one_pass})
    sets = [_ItemSet(source, config, label) for source in config.data.evaluate]
    reporter, observed = Reporter(), list[dict[str, Any]]()
    folder = RunFolder(out).create(configs.dump(config), versions(), resume=True)
    with Rewarder(config.reward, one_pass.max_new_tokens) as rewarder, reporter.bars():
        for model, path in zip(distinct_names(models), paths, strict=True):
            processing, _, engine = build_engine(config, path)
            with contextlib.closing(engine):
                for items, level in itertools.product(sets, levels):
                    name, started, persona = _shown(model, level), time.perf_counter(), PROFICIENCIES[level]
                    spoken = rating == "spoken"
                    with reporter.bar(f"{items.name} ({name})", len(items.examples) * (1 + spoken)) as advance:
                        acted = items.ask(engine, processing, rewarder, persona, advance)
                        write(folder, name, items.name, acted, one_pass, time.perf_counter() - started)
                        found = {p.index: _uncertainty(p.records[0]) for p in acted}
                        if spoken:
                            rated = items.ask(engine, processing, _RatingReader(items.words), persona, advance)
                            found = {p.index: p.records[0].parts.get("rating") for p in rated}
                            observed += [{"model": name, "task": items.name, **asdict(p.records[0])} for p in rated]
                    solved: dict[int, float | None] = {p.index: float(p.records[0].success) for p in acted}
                    items.replies[model, level] = items.column(solved), items.column(found)
    if observed:
        write_jsonl(out / "observers.jsonl", observed)
    folder.write_difficulty({items.name: {"rating": rating, **items.statistics()} for items in sets})
    for name, result in folder.read_difficulty().items():
        reporter.say(f"\n{name}: {result['items']:,} items with a {label}")
        for table in difficulty.tables(result):
            reporter.table(*table)
    reporter.say(f"results and replies in {out}")
    return 0


def _shown(model: str, proficiency: str) -> str:
    return model if proficiency == "none" else f"{model} ({proficiency})"


def _uncertainty(record: SampleRecord) -> float | None:
    """1 − the geometric mean probability of the tokens: `entropy` is the mean of their −log p."""
    return None if record.entropy is None else 1 - float(np.exp(-record.entropy))


def from_rollouts(run_dir: Path, label: str, out: Path) -> int:
    """Write the problems of a run's rollouts to `out`, a table of JSON lines, hardest first; print a summary.

    Returns the exit status. Raises RunFolderError if the run kept no rollouts, or `out` cannot be written.
    """
    problems = sorted(problem_success(run_dir).values(), key=lambda problem: -problem.difficulty)
    write_problems(out, problems)
    labels = [label_value(each.meta.get(label), f"{each.example_id}: {label}") for each in problems]
    rate_N = np.array([each.rate for each in problems])
    rho = with_interval(spearman, 1 - rate_N, np.array(labels, dtype=float))
    never, always = (rate_N == 0).sum(), (rate_N == 1).sum()
    reporter = Reporter()
    reporter.say(f"{len(problems):,} problems, {never:,} never solved, {always:,} always")
    reporter.say(f"Spearman of D and {label}: {difficulty.shown(rho)}")
    reporter.say(f"table in {out}; train with data.difficulty_from={out}")
    return 0
