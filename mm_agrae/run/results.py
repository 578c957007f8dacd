"""A run as a notebook reads it: `mm_agrae.load_run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.run.checkpoint import newest
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow import Table


class Run:
    """What a run has left so far in its folder, read anew at each access: it may still be going on.

    Raises RunFolderError if there is no run in `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = RunFolder(path)
        self.folder.read_config()

    @property
    def config(self) -> Config:
        """The resolved config. Raises ConfigError if this version no longer takes it."""
        return configs.parse(yaml.safe_load(self.folder.read_config()), source=str(self.path / "config.yaml"))

    @property
    def summary(self) -> dict[str, Any]:
        """pass@k, seconds by stage, versions and more; empty until the run has ended."""
        return self.folder.read_summary()

    @property
    def evaluations(self) -> list[EvaluationResult]:
        """ "before" first, "after" last."""
        return self.folder.read_evaluations()

    @property
    def checkpoint(self) -> Path | None:
        """The newest one; transformers loads it from there."""
        return newest(self.path / "checkpoints")

    def metrics(self) -> DataFrame:
        """One row a step, indexed by it; one column for each metric, such as `success/mean`."""
        from pandas import DataFrame

        return DataFrame(self.folder.read_metrics() or {"step": []}).set_index("step")

    def rollouts(self, steps: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> Table:
        """Every completion that was kept, or those of some steps, as `RunFolder.rollout_table`, with `to_pandas`."""
        return self.folder.rollout_table(steps, columns)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"
