"""How often each problem of a run was solved, step by step, and the difficulty D that follows from it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_agrae.config import Config
from mm_agrae.errors import DataError, RunFolderError
from mm_agrae.run import checkpoint
from mm_agrae.run.files import explained, write_jsonl
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import sampled_success
from mm_agrae.tasks.variants import EASIEST, HARDEST

AT_START = "difficulty_at_start.jsonl"
"""In a run folder with `data.difficulty_from`: D as it was when the run began, which a resumed one reads."""


@dataclass
class ProblemSuccess:
    """One problem in the rollouts of a run: of each step that drew it, completions correct as sampled, and all."""

    example_id: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    correct: Counter[int] = field(default_factory=Counter)
    completions: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.correct.total() / self.completions.total()

    @property
    def difficulty(self) -> float:
        """D₀ of DIVA-GRPO from the pass rate: 1 always solved, 9 never."""
        return EASIEST + (HARDEST - EASIEST) * (1 - self.rate)


def problem_success(run_dir: str | Path) -> dict[str, ProblemSuccess]:
    """The problems of a run's rollouts by id, in the order in which they were first drawn.

    Raises RunFolderError if there is no run, it kept no rollouts, or one is damaged.
    """
    run, found = RunFolder(run_dir), dict[str, ProblemSuccess]()
    run.read_config()
    for step in run.rollout_steps():
        for rows in run.iter_rollouts(step, ["example_id", "success", "success_before", "meta", "variant"]):
            for row in rows:
                if row.get("variant"):
                    continue  # not the problem itself
                problem = found.setdefault(row["example_id"], ProblemSuccess(row["example_id"], row["meta"]))
                problem.correct[step] += sampled_success(row)
                problem.completions[step] += 1
    if not found:
        raise RunFolderError(
            f"run folder {run_dir}: it holds no rollouts; it needs log.rollouts=true, and a whole step"
        )
    return found


def difficulty_of(source: str | Path) -> dict[str, float]:
    """Problem -> D from 1 (easy) to 9: of a run folder from its rollouts, of a table (JSON lines) as it says.

    Of a table only `example_id` and `difficulty` are read. Raises RunFolderError as `problem_success`, DataError for
    a bad line.
    """
    path, found = Path(source), dict[str, float]()
    if not path.is_file():
        return {problem.example_id: problem.difficulty for problem in problem_success(path).values()}
    with explained(path.parent, f"reading {path.name}"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found[str(row["example_id"])] = difficulty = float(row["difficulty"])
            if not EASIEST <= difficulty <= HARDEST:
                raise ValueError(f"difficulty is {difficulty}, not {EASIEST:g} to {HARDEST:g}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            example = '{"example_id": "7", "difficulty": 5.0}'
            raise DataError(f"{path}, line {number}: not a line such as {example} ({error})") from None
    return found


def difficulty_source(config: Config) -> Path:
    """Where D is read: a run that goes on reads what it began with, whatever has become of `difficulty_from`."""
    start = checkpoint.newest(Path(config.run_dir) / "checkpoints") or Path(config.resume)
    kept = start.resolve().parent.parent / AT_START
    return kept if start.is_dir() and kept.is_file() else Path(config.data.difficulty_from)


def keep_difficulty(run_dir: Path, difficulty: Mapping[str, float]) -> None:
    """For `difficulty_source`. Raises RunFolderError."""
    write_jsonl(run_dir / AT_START, ({"example_id": key, "difficulty": value} for key, value in difficulty.items()))


def write_problems(path: Path, problems: Iterable[ProblemSuccess]) -> None:
    """A line a problem: id, D, pass rate, and by step the correct completions and all. Raises RunFolderError."""
    write_jsonl(path, ({**vars(p), "difficulty": p.difficulty, "rate": p.rate} for p in problems))
