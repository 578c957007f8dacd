"""The run folder: everything a run leaves behind, in plain files.

    config.yaml                              the resolved config
    versions.json                            packages, code revision, when the run was created
    metrics.jsonl                            one line per step
    rollouts/step_000001.parquet             every completion of a step, see RolloutRecord
    images/<hash>.png                        each distinct image once
    evaluations/<name>/result.json           pass@k and more, see EvaluationResult
    evaluations/<name>/samples.jsonl         every sample of that evaluation, see SampleRecord;
                                             read gzipped (samples.jsonl.gz) as well
    checkpoints/                             written by `checkpoint`
    rollout_cache_0.safetensors              rollouts of the step under way, see `rollout.cache`
    difficulty.json                          written by `mm-agrae difficulty`, see `evaluation.alignment`
    summary.json                             totals of the finished run
    report.html                              written by `view.report`

Every file is written whole or not at all, see `files`. What the operating system refuses becomes a
`RunFolderError` that names the folder and says what to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mm_agrae.errors import RunFolderError
from mm_agrae.run.files import append_line, clean_text, explained, open_lines, to_json, write_atomic, write_jsonl
from mm_agrae.run.records import (
    LATER_COLUMNS,
    ROLLOUT_COLUMNS,
    EvaluationResult,
    RolloutRecord,
    SampleRecord,
    current_name,
    rollout_rows,
    rollout_table,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from pyarrow.parquet import ParquetFile

ROWS_PER_GROUP = 512
"""Completions in one row group of a Parquet file: the least that is decoded to show one of them."""


class MetricsMark(NamedTuple):
    """How far metrics.jsonl has been read: which file (inode), bytes and lines of it."""

    file: int
    end: int
    lines: int


class RunFolder:
    """Reads and writes one run folder. Making the object touches no file; see the module."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stored: dict[int, tuple[weakref.ref[Image], str]] = {}

    def create(self, config_yaml: str, versions: Mapping[str, Any], *, resume: bool = False) -> RunFolder:
        """Make the folder, or with `resume` continue in one that holds a run.

        Raises RunFolderError if it cannot be written, or holds a run and `resume` is not set.
        """
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with explained(self.path, "making it"):
            if (self.path / "config.yaml").exists():
                if not resume:
                    raise RunFolderError(
                        f"run folder {self.path}: it holds a run already; resume that run, "
                        "delete the folder, or choose another run_dir"
                    )
                with suppress(RunFolderError):
                    created = self.read_versions().get("created", created)
            self.path.mkdir(parents=True, exist_ok=True)
        self._write("versions.json", to_json({"created": created, **versions}, indent=2) + "\n")
        self._write("config.yaml", clean_text(config_yaml))
        return self

    def rewind(self, step: int) -> None:
        """Drop metrics and rollouts after `step`, which a resumed run writes again."""
        lines = [to_json(row) + "\n" for row in self.read_metrics() if row.get("step", 0) <= step]
        if lines or (self.path / "metrics.jsonl").exists():
            self._write("metrics.jsonl", "".join(lines))
        with explained(self.path, "removing rollouts of later steps"):
            for later in self.rollout_steps():
                if later > step:
                    self._rollout_path(later).unlink()

    def read_config(self) -> str:
        """The resolved config as YAML text. Raises RunFolderError if there is no run here."""
        with explained(self.path, "reading config.yaml"):
            if not (self.path / "config.yaml").is_file():
                raise RunFolderError(
                    f"run folder {self.path}: there is no run here (no config.yaml); give the run_dir of a run"
                )
            return (self.path / "config.yaml").read_text("utf-8", errors="replace")

    def read_versions(self) -> dict[str, Any]:
        return self._read_json("versions.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", to_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Empty until the run has ended."""
        return self._read_json("summary.json")

    def write_difficulty(self, results: Mapping[str, Any]) -> None:
        self._write("difficulty.json", to_json(results, indent=2) + "\n")

    def read_difficulty(self) -> dict[str, Any]:
        """What `mm-agrae difficulty` measured, by evaluation set; empty if it was not run here."""
        return self._read_json("difficulty.json")

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite are written as null."""
        with explained(self.path, "writing metrics.jsonl"):
            append_line(self.path / "metrics.jsonl", to_json(metrics))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines in order. A last line that is not complete (yet) is left out."""
        path = self.path / "metrics.jsonl"
        with explained(self.path, f"reading {path.name}"):
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        rows = self._parse_metrics(lines[:-1], 0)
        with suppress(RunFolderError):  # a last line without its newline may be cut short
            rows += self._parse_metrics(lines[-1:], len(lines) - 1)
        return rows

    def follow_metrics(self, mark: MetricsMark | None = None) -> tuple[list[dict[str, Any]], MetricsMark | None, bool]:
        """Rows finished since `mark`, the new mark, and whether these are all rows of the file.

        They are if there was no mark, or if a resumed run has rewritten the file.
        """
        path = self.path / "metrics.jsonl"
        with explained(self.path, f"reading {path.name}"):
            if not path.exists():
                return [], None, True
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                from_start = mark is None or mark.file != state.st_ino or mark.end > state.st_size
                start = MetricsMark(state.st_ino, 0, 0) if from_start or mark is None else mark
                file.seek(start.end)
                content, newline, _ = file.read().rpartition(b"\n")
        lines = content.split(b"\n") if newline else []
        rows = self._parse_metrics(lines, start.lines)
        end = start.end + len(content) + len(newline)
        return rows, MetricsMark(start.file, end, start.lines + len(lines)), from_start

    def _parse_metrics(self, lines: Sequence[bytes], before: int) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(lines, before + 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a mapping")
            except ValueError as error:
                raise RunFolderError(
                    f"run folder {self.path}: metrics.jsonl line {number} is damaged ({error}); remove that line"
                ) from None
            rows.append({sys.intern(current_name(name)): value for name, value in row.items()})
        return rows

    def write_rollouts(self, step: int, records: Sequence[RolloutRecord]) -> None:
        """Write the completions of a step as one Parquet file (zstd), replacing an earlier one."""
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        table = rollout_table(records)
        pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_PER_GROUP)
        write_atomic(self._rollout_path(step), buffer.getvalue(), self.path)

    def read_rollouts(
        self, step: int, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The rows of a step as dicts with the names of RolloutRecord, in the order written. A file of an earlier
        version may lack `LATER_COLUMNS`.

        `columns` and `rows` (indices from 0, returned in that order) read only a part, which
        saves time and memory. Raises ValueError for a column that does not exist,
        RunFolderError if the step or such a row does not exist or the file is damaged.
        """
        with self._rollout_file(step, columns) as (file, stored):
            if rows is None:
                return rollout_rows(file.read(columns=stored).to_pylist())
            found: dict[int, dict[str, Any]] = {}
            start = 0
            for index in range(file.num_row_groups):
                end = start + file.metadata.row_group(index).num_rows
                if inside := sorted({row for row in rows if start <= row < end}):
                    part = file.read_row_group(index, columns=stored)
                    part = part.take([row - start for row in inside])
                    found |= zip(inside, rollout_rows(part.to_pylist()), strict=True)
                start = end
            if not found.keys() >= set(rows):
                raise RunFolderError(f"run folder {self.path}: step {step} has been rewritten; open it again")
            return [found[row] for row in rows]

    def iter_rollouts(self, step: int, columns: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:
        """The same rows, some hundred at a time, for steps too large for memory."""
        with self._rollout_file(step, columns) as (file, stored):
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=stored):
                yield rollout_rows(batch.to_pylist())

    @contextmanager
    def _rollout_file(self, step: int, columns: Sequence[str] | None) -> Iterator[tuple[ParquetFile, list[str]]]:
        """The open file of a step and the names it has for `columns` (None: for all of them)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if unknown := set(columns or ()) - ROLLOUT_COLUMNS.keys():
            raise ValueError(f"no column {sorted(unknown)}; there are {', '.join(ROLLOUT_COLUMNS)}")
        path = self._rollout_path(step)
        with explained(self.path, f"reading {path.name}"):
            if not path.exists():
                steps = self.rollout_steps()
                kept = f"kept are {steps[0]} to {steps[-1]}" if steps else "none was kept"
                raise RunFolderError(f"run folder {self.path}: no rollouts of step {step}; {kept}")
            try:
                with pq.ParquetFile(path) as file:
                    stored = {current_name(name): name for name in file.schema_arrow.names}
                    wanted = [c for c in columns or ROLLOUT_COLUMNS if c in stored or c not in LATER_COLUMNS]
                    if missing := set(wanted) - stored.keys():
                        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
                    yield file, [stored[name] for name in wanted]
            except (pa.ArrowException, ValueError, TypeError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the operating system's; Arrow's own, for damaged pages, have no number
                raise RunFolderError(f"run folder {self.path}: {path.name} is damaged ({error}); delete it") from None

    def rollout_steps(self) -> list[int]:
        """Steps whose rollouts were kept, ascending."""
        names = [path.name for path in (self.path / "rollouts").glob("step_*.parquet")]
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)\.\w+", name)))

    def rollout_stamp(self, step: int) -> tuple[int, int]:
        """Changes whenever the rollouts of a step are rewritten; (0, 0) if there are none."""
        try:
            state = self._rollout_path(step).stat()
        except OSError:
            return 0, 0
        return state.st_mtime_ns, state.st_size

    def store_image(self, image: Image) -> str:
        """Store an image unless an equal one is stored, and return its path in the run folder.

        The name is the SHA-256 of its pixels. The object must not be changed between calls. Any thread may call.
        """
        known = self._stored.get(id(image))
        if known is not None:
            return known[1]
        stored = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        content = f"{stored.mode} {stored.size} ".encode() + stored.tobytes()
        relative = f"images/{hashlib.sha256(content).hexdigest()[:16]}.png"
        if not (self.path / relative).exists():
            buffer = io.BytesIO()
            stored.save(buffer, "PNG", compress_level=3)  # half the time of the default, 2 % larger
            self._write(relative, buffer.getvalue())
        key = id(image)  # ids are reused: the entry goes with its image
        forget = weakref.ref(image, lambda _: self._stored.pop(key, None))
        self._stored[key] = (forget, relative)
        return relative

    def image_path(self, relative: str) -> Path | None:
        """The file of a stored image; None if it is missing or not inside the run's images."""
        images = (self.path / "images").resolve()
        try:
            path = (self.path / relative).resolve()
            return path if images in path.parents and path.is_file() else None
        except (OSError, ValueError):  # a NUL, a name too long, a loop of links
            return None

    def write_evaluation(self, result: EvaluationResult, samples: Iterable[SampleRecord | Mapping[str, Any]]) -> Path:
        """Write a result with its samples, replacing an earlier one of the same name and label.

        The folder is called after the name; where that is taken, as by a second task evaluated
        under the same name, `<name>@<label>`.
        """
        name, label = _slug(result.name), _slug(result.label)
        digest = hashlib.sha256(clean_text(f"{result.name}\n{result.label}").encode()).hexdigest()
        names = (name, f"{name}@{label}", f"{name}@{label}-{digest[:8]}")
        folders = [self.path / "evaluations" / candidate for candidate in names]
        held = {folder: self._read_result(folder) for folder in folders}
        same = [f for f, other in held.items() if other and _key(other) == _key(result)]
        free = [f for f, other in held.items() if other is None]
        folder = (same + free)[0]
        with explained(self.path, f"writing the evaluation {result.name!r}"):
            # Without result.json the folder does not count: never new samples by an old result.
            for old in ("result.json", "samples.jsonl.gz"):
                (folder / old).unlink(missing_ok=True)
        write_jsonl(folder / "samples.jsonl", samples)
        write_atomic(folder / "result.json", result.to_json())
        return folder

    def read_evaluations(self) -> list[EvaluationResult]:
        """All results: "before" first, then by name, "after" last."""
        results = [result for _, result in self._evaluations()]
        order = {"before": 0, "after": 2}
        return sorted(results, key=lambda result: (order.get(result.name, 1), result.name))

    def read_samples(self, result: EvaluationResult) -> Iterator[dict[str, Any]]:
        """The samples of an evaluation one by one, as dicts with the names of SampleRecord."""
        path = self.samples_path(result)
        if path is None:
            return
        with explained(self.path, f"reading {path.name}"), open_lines(path) as file:
            done = 0
            try:
                for line in file:
                    row = json.loads(line)
                    done += 1
                    yield row
            except (ValueError, EOFError, zlib.error) as error:
                raise RunFolderError(f"{path} line {done + 1} is damaged ({error})") from None

    def samples_path(self, result: EvaluationResult) -> Path | None:
        """The file with the samples of an evaluation; None if there is no such evaluation."""
        for folder, held in self._evaluations():
            if _key(held) == _key(result):
                gzipped = folder / "samples.jsonl.gz"
                return gzipped if gzipped.is_file() else folder / "samples.jsonl"
        return None

    def _evaluations(self) -> Iterator[tuple[Path, EvaluationResult]]:
        for path in sorted(self.path.glob("evaluations/*/result.json")):
            if (result := self._read_result(path.parent)) is not None:
                yield path.parent, result

    def _read_result(self, folder: Path) -> EvaluationResult | None:
        path = folder / "result.json"
        with explained(self.path, f"reading {path}"):
            if not path.exists():
                return None
            try:
                return EvaluationResult.from_json(path.read_text("utf-8"))
            except ValueError as error:
                raise RunFolderError(f"{path}: damaged ({error}); delete its folder") from None

    def _rollout_path(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.parquet"

    def _write(self, relative: str, content: str | bytes) -> None:
        write_atomic(self.path / relative, content, self.path)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        with explained(self.path, f"reading {name}"):
            if not path.exists():
                return {}
            try:
                values = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise RunFolderError(f"{path}: not valid JSON ({error}); delete it") from None
        return values if isinstance(values, dict) else {}


def _key(result: EvaluationResult) -> tuple[str, str]:
    return clean_text(result.name), clean_text(result.label)


def _slug(name: str) -> str:
    """A safe folder name: no separators, no leading dot."""
    return re.sub(r"[^\w.+=-]+", "-", clean_text(name)).lstrip(".")[:100] or "unnamed"


def summarise_evaluations(run: RunFolder, label: str) -> dict[str, Any]:
    """pass@k and greedy accuracy of every evaluation of one task, and the families that fell through training, for the
    run's summary."""
    found = [result for result in run.read_evaluations() if result.label == label]
    ends = {result.name: result for result in found}
    compared = {"before", "after"} <= ends.keys() and "family" in ends["after"].groups
    return {
        "pass_at_k": {
            result.name: {k: asdict(interval) for k, interval in result.pass_at_k.items()} for result in found
        },
        "greedy": {result.name: asdict(result.greedy) for result in found if result.greedy},
        "families_fallen": ends["after"].falls(ends["before"], "family") if compared else None,
    }
