"""What a run warns of, worked out from the metrics of its steps.

Each state in the table `WARNINGS` has a section of its name in docs/warnings.md. Conditions are functions of rows of
metrics.jsonl, oldest first: the first and the newest `SPAN` steps of the run.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Rows = Sequence[Mapping[str, Any]]

SPAN = 10  # steps averaged at either end to tell a trend: single steps of a sound run differ by a third
STEPS_AT_ZERO = 3  # without a correct answer, or all cut off: hundreds of completions in most configs
STEPS_ALIKE = 5  # without signal, or clipped; the embedded task, once solved, has up to 3 without signal in a row
# Truncated: a sound run has a few percent. Correct: what is left teaches little, and low entropy is fine.
MOST = 0.9
ENTROPY_LEFT = 0.1  # of that at the start; the embedded task keeps a fifth or more until it is solved
# Share of tokens, usually below .05 (a run that broke by its rate had .14 to .29), and the largest ratio of new to old
# policy beside it: the bounds of gspo are so narrow that many tokens are clipped while the policy hardly moves.
CLIPPED, CLIPPED_RATIO = 0.1, 1.5
# Times the engine's mean difference at the start, and the least (nats) that matters: twice that of bfloat16.
MISMATCH_GROWN, MISMATCH_LEAST = 3.0, 0.02
GAP = 10  # a state that is back within so many steps has not ended: one near its bound would be told again and again


def newest(rows: Rows, steps: int, *names: str) -> list[float]:
    """Sums of these metrics in the newest steps. NaN, of which no comparison holds, stands for what is missing."""
    values = [[row[name] if row.get(name) is not None else math.nan for name in names] for row in rows[-steps:]]
    return [math.nan] * (steps - len(rows)) + [sum(row) for row in values]


def grown(rows: Rows, name: str) -> float:
    """The mean of the newest steps over that of the first; NaN while they overlap."""
    first = fmean(newest(rows[:SPAN], SPAN, name))
    return fmean(newest(rows, SPAN, name)) / first if first and len(rows) == 2 * SPAN else math.nan


# fmt: off
WARNINGS: dict[str, tuple[Callable[[Rows], bool], str, tuple[str, ...]]] = {
    "truncated": (
        lambda rows: all(x > MOST for x in newest(rows, STEPS_AT_ZERO, "completions/truncated")),
        f"over {MOST:.0%} of completions were cut off in each of {STEPS_AT_ZERO} steps. Raise rollout.max_new_tokens, "
        "or, if this came with training, lower the learning rate; update.mask_truncated=true leaves the rest out", ()),
    "none-correct": (
        lambda rows: all(x == 0 for x in newest(rows, STEPS_AT_ZERO, "success/mean")),
        f"no answer was correct in {STEPS_AT_ZERO} steps. Either the problems are too hard, or gold answers and "
        "grading do not fit: see `mm-agrae data CONFIG` and the completions in `mm-agrae report RUN`", ("truncated",)),
    "all-correct": (
        lambda rows: all(x > MOST for x in newest(rows, STEPS_ALIKE, "groups/all_correct")),
        f"over {MOST:.0%} of groups were all correct in each of {STEPS_ALIKE} steps and teach nothing more. Take "
        "harder problems, set rollout.dynamic_sampling, or stop here", ()),
    "no-gradient": (
        lambda rows: all(x == 1 for x in newest(rows, STEPS_ALIKE, "groups/no_signal"))
        or all(x < 1e-8 for x in newest(rows, STEPS_ALIKE, "update/grad_norm")),
        f"rewards gave no gradient in {STEPS_ALIKE} steps: those of a group are all the same. See them in `mm-agrae "
        "report RUN`; add a part that tells completions apart, or raise rollout.temperature",
        ("truncated", "none-correct", "all-correct")),
    "variants": (
        lambda rows: all(x == 0 for x in newest(rows, STEPS_AT_ZERO, "variants/share")),
        f"no problem had a variant in {STEPS_AT_ZERO} steps, only itself once more. `mm-agrae variants CONFIG` "
        "shows what fits; --prepare makes wordings and steps, data.difficulty_from says what is easy", ()),
    "entropy": (
        lambda rows: grown(rows, "policy/entropy") < ENTROPY_LEFT and fmean(newest(rows, SPAN, "success/mean")) < MOST,
        f"entropy is below {ENTROPY_LEFT:.0%} of what it was, though answers are still wrong: a group's completions "
        "are much alike. Go on from an earlier checkpoint with a lower learning rate or update.entropy_coef", ()),
    "clipping": (
        lambda rows: all(x > CLIPPED for x in newest(rows, STEPS_ALIKE, "policy/clip_low", "policy/clip_high"))
        and all(x > CLIPPED_RATIO for x in newest(rows, STEPS_ALIKE, "policy/ratio_max")),
        f"over {CLIPPED:.0%} of tokens were clipped in each of {STEPS_ALIKE} steps: the policy moves too far within a "
        "rollout. Lower update.learning_rate or update.epochs, or raise update.mini_batch_prompts", ()),
    "mismatch": (
        lambda rows: grown(rows, "mismatch/mean_abs") > MISMATCH_GROWN
        and fmean(newest(rows, SPAN, "mismatch/mean_abs")) > MISMATCH_LEAST,
        f"the engine's log-probabilities differ from the policy's {MISMATCH_GROWN:.0f} times as much as at the start. "
        "Try rollout.vllm.dtype=float32, rollout.overlap=false, or a lower update.learning_rate", ()),
}
# fmt: on
"""Name -> whether it holds, what is said, and earlier states that would be the reason for it."""


class Watch:
    """Tells each state once until it ends, and once more after `rows`, those of a resumed run, as their output may be
    elsewhere. `spans`: the first and last step of each time that a state held."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self._told: set[str] = set()
        self.spans: dict[str, list[list[int]]] = {}
        for row in rows:
            self.add(row)
        self._told.clear()

    def add(self, row: Mapping[str, Any]) -> list[str]:
        """Take the metrics of one more step, "step" among them; returns the lines to be said."""
        self._rows.append(row)
        del self._rows[SPAN:-SPAN]
        step, holding, said = row["step"], set[str](), []
        for name, (holds, text, reasons) in WARNINGS.items():
            if holding.isdisjoint(reasons) and holds(self._rows):
                holding.add(name)
                spans = self.spans.setdefault(name, [])
                if new := not spans or step > spans[-1][1] + GAP:
                    spans.append([step, step])
                spans[-1][1] = step
                if new or name not in self._told:
                    said.append(f"warning: {text} (docs/warnings.md#{name})")
                    self._told.add(name)
        return said
