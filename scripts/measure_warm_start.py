"""Measure what a small checkpoint sees, and how it chooses: `data/warm_start/vl` or one trained from it.

    python scripts/measure_warm_start.py data/warm_start/vl
    python scripts/measure_warm_start.py data/warm_start/text --problems 256 --samples 256

Sight: through the language model, greedily, on held-out images whose sets of numbers the training split does not have;
then on blanked images and on those of other problems. An answer counts only if it is exact: the figure's name, all
numbers of a geometry figure, all three counts, all bars.

Policy: pass@k by family on problems of the test split, and how often the correct rule is sampled.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from teacher import NAME_IT, PICTURE_PX, READ_IT, naming, reading

from mm_agrae import config as configs
from mm_agrae.evaluation.evaluate import build_engine, run
from mm_agrae.evaluation.statistics import pass_at_k
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.tasks.synthetic.problems import Problem
from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.types import Example

ROOT = Path(__file__).parents[1]
SHARES = {"geometry": 0.5, "counting": 0.25, "charts": 0.25}
SEED = 1000
RARE = (0.002, 0.03)
"""Range of the probability of the correct rule that counts as rare: reinforcement learning has to find it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pictures", type=int, default=1000, help="0: policy alone")
    parser.add_argument("--problems", type=int, default=256, help="0: sight alone")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--confusions", action="store_true", help="list the figures that are taken for others")
    args = parser.parse_args()
    config = configs.load(
        str(ROOT / "configs" / "quickstart.yaml"),
        [f"evaluate.samples={args.samples}", "evaluate.greedy=true", "evaluate.batch_completions=256"],
    )
    processing, _, engine = build_engine(config, args.model)
    with contextlib.closing(engine):
        if args.pictures and processing.is_multimodal:
            sight(engine, processing, config, args.pictures, args.confusions)
        if args.problems:
            policy(engine, processing, config, args.problems)


def sight(engine: Any, processing: Any, config: configs.Config, pictures: int, confusions: bool) -> None:
    greedy = config.evaluate.model_copy(update={"temperature": 0.0, "max_new_tokens": 32})
    asked: list[tuple[str, str, str, Problem, Image.Image]] = []
    for family, share in SHARES.items():
        task = SyntheticTask("test", size=10**9, seed=SEED, families=[family])
        for index in range(round(share * pictures)):
            problem, rng = task.problem(index)
            image, _ = problem.draw(rng, PICTURE_PX)
            if family == "geometry":
                asked.append(("names the figure", NAME_IT, naming(problem), problem, image))
            asked.append((f"reads all of {family}", READ_IT, reading(problem), problem, image))
    images = [row[-1] for row in asked]
    blank = Image.new("RGB", images[0].size, "white")
    shown = {"as drawn": images, "blanked": [blank] * len(images), "swapped": images[7:] + images[:7]}
    score: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    taken: Counter[tuple[str, str]] = Counter()
    reporter = Reporter()
    with reporter.bars(), reporter.bar("sight", len(shown) * len(asked)) as advance:
        for how, pictured in shown.items():
            prompts = [
                processing.prompt(Example(id=str(k), question=row[1], answer=row[2], images=(image,)))
                for k, (row, image) in enumerate(zip(asked, pictured, strict=True))
            ]
            groups = engine.generate(prompts, 1, greedy, range(len(prompts)), advance)
            for (title, _, truth, problem, _), (completion,) in zip(asked, groups, strict=True):
                said = completion.text.strip()
                score[title][how].append(said == truth)
                if title == "reads all of geometry" and problem.level == 4:
                    score["... of level 4"][how].append(said == truth)
                if how == "as drawn" and title == "names the figure" and said != truth:
                    taken[truth, said] += 1
    rows = [
        [title, str(len(found["as drawn"])), *(f"{np.mean(found[how]):.1%}" for how in shown)]
        for title, found in score.items()
    ]
    reporter.table(f"sight, {pictures} held-out images", ["", "images", *shown], rows)
    if confusions:
        for (truth, said), count in taken.most_common(20):
            print(f"  {truth} taken for {said!r}: {count}")


def policy(engine: Any, processing: Any, config: configs.Config, problems: int) -> None:
    modality = "image" if processing.is_multimodal else "text"
    task = SyntheticTask("test", size=problems, seed=SEED, modality=modality)
    reporter, total = Reporter(), problems * (config.evaluate.samples + 1)
    with (
        Rewarder(config.reward, config.evaluate.max_new_tokens) as rewarder,
        reporter.bars(),
        reporter.bar("policy", total) as advance,
    ):
        found = run(engine, processing, rewarder, task, range(problems), config.evaluate, on_progress=advance)
    kinds: dict[str, list[int]] = defaultdict(list)
    correct, rule = [], []
    for place, each in enumerate(found):
        meta = each.example.meta
        for kind in ("all", meta["family"], f"level {meta['level']}", f"  {meta.get('ask', meta['figure'])}"):
            kinds[kind].append(place)
        drawn = [record for record in each.records if record.sample >= 0]
        correct.append([record.success for record in drawn])
        rule.append([record.parts["rule"] == 1.0 for record in drawn])
    correct_PN, rule_PN = np.array(correct), np.array(rule)
    solved_PN = correct_PN & rule_PN
    samples = correct_PN.shape[1]
    ks = [k for k in (1, 16, 256) if k <= samples]
    rows = []
    for kind, places in kinds.items():
        right = correct_PN[places]
        values = [pass_at_k(samples, right.sum(1), k).mean() for k in ks]
        named = rule_PN[places]
        rows.append(
            [kind, str(len(places)), *(f"{v:.1%}" for v in values), f"{named.mean():.1%}", _share(named[right])]
        )
    header = ["", "problems", *(f"pass@{k}" for k in ks), "correct rule", "... of correct answers"]
    reporter.table(f"policy ({modality}), {samples} samples", header, rows)
    often = solved_PN.mean(1)
    rare = np.mean((often >= RARE[0]) & (often < RARE[1]))
    several = np.mean([len(each.example.meta["ways"]) > 1 for each in found])
    print(f"a solution by a correct rule is sampled with probability {RARE[0]} to {RARE[1]} in {rare:.1%} of the")
    print(f"problems, never in {np.mean(often == 0):.1%}; {several:.1%} have two valid rules")


def _share(values: Sequence[bool]) -> str:
    return f"{np.mean(values):.1%}" if len(values) else "-"


if __name__ == "__main__":
    main()
