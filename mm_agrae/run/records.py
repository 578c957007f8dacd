"""The run folder: everything a run leaves behind, in plain files.

    config.yaml                              the resolved config
    versions.json                            packages, code revision, when the run was created
    metrics.jsonl                            one line a step
    rollouts/step_000001.parquet             every completion of a step, with its advantages
    images/<hash>.png                        each distinct picture once
    evaluations/<name>/result.json           pass@k and the like, see EvaluationResult
    evaluations/<name>/samples.jsonl         every sample of that evaluation, see SampleRecord;
                                             read packed (samples.jsonl.gz) as well
    checkpoints/                             written by `checkpoint`
    unfinished_0.safetensors                 while a step is under way, see `unfinished`
    summary.json                             the figures of the whole run
    report.html                              written by `report`

A file that would do harm half-written is written beside its place, synced and renamed; a line
of metrics.jsonl that could not be written whole is taken back. So a full disk or a killed run
never costs what was there before. Whatever the operating system refuses becomes a
`RunFolderError` that names the folder and says what to do.

Texts come from models and may hold anything. Surrogates without a partner, which no file format
here can hold, are stored as U+FFFD; everything else round-trips.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mm_agrae.errors import RunFolderError

if TYPE_CHECKING:
    from PIL.Image import Image
    from pyarrow.parquet import ParquetFile

ROWS_PER_GROUP = 512
"""Completions in one row group of a Parquet file: the least that is decoded to show one of them."""

RENAMED = {
    "groups/all_right": "groups/all_correct",
    "groups/all_wrong": "groups/all_incorrect",
    "completions/right": "completions/correct",
    "draw": "resample_round",
}
"""Metrics and rollout columns as version 0.1.0 wrote them -> their names today, as all readers
get them."""


def current_name(name: str) -> str:
    return RENAMED.get(name, name)


@dataclass(frozen=True)
class RolloutRecord:
    """One completion of a training step, as kept in the rollout's Parquet file.

    `resample_round` is the round of dynamic sampling that its group comes from, 0 the first.
    `tokens` is the completion's length, `entropy` the mean over its tokens in nats. The three
    advantages are the normalised reward before any rescaling, after the sample level, and the
    final one. `images` are paths relative to the run folder, as `RunFolder.store_image` returns
    them.
    """

    step: int
    prompt_index: int
    completion_index: int
    example_id: str
    question: str
    prompt_text: str
    answer: str
    completion: str
    tokens: int
    finish_reason: str
    reward: float
    success: bool
    resample_round: int = 0
    images: tuple[str, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    advantage_before: float | None = None
    advantage_sample_level: float | None = None
    advantage: float | None = None
    entropy: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRecord:
    """One completion of an evaluation. `sample` counts from 0; the greedy one has -1."""

    example_id: str
    sample: int
    question: str
    answer: str
    completion: str
    success: bool
    tokens: int
    finish_reason: str
    images: tuple[str, ...] = ()
    entropy: float | None = None
    error: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation of one task found. Shares and accuracies are in [0, 1].

    `name` is "before", "step_000050", "after" or the user's own; `label` names the task.
    `mean_tokens` is the mean length of a completion, `truncated` the share cut off by the
    token limit, `entropy` the mean over all sampled tokens in nats (None: not measured),
    `unsolved` the share of problems with no right completion. `groups` breaks pass@1 and
    pass@n down by the entries of the examples' `meta`:
    `{"level": {"3": {"problems": 40, "pass_at_k": {1: Interval, 16: Interval}}}}`.
    """

    name: str
    label: str
    problems: int
    samples: int
    pass_at_k: dict[int, Interval]
    greedy: Interval | None
    mean_tokens: float
    truncated: float
    entropy: float | None
    unsolved: float
    groups: dict[str, dict[str, dict[str, Any]]]
    seconds: float
    tokens: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the metric log, named `evaluate/<label>/…`."""
        values = {f"pass@{k}": interval.mean for k, interval in self.pass_at_k.items()}
        values |= {name: getattr(self, name) for name in ("mean_tokens", "truncated", "unsolved")}
        if self.greedy is not None:
            values["greedy"] = self.greedy.mean
        if self.entropy is not None:
            values["entropy"] = self.entropy
        return {f"evaluate/{self.label}/{name}": value for name, value in values.items()}

    def to_json(self) -> str:
        return to_json(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError if it is not that."""
        values = json.loads(text)
        values = {item.name: values[item.name] for item in fields(cls)}
        values["pass_at_k"] = _intervals(values["pass_at_k"])
        if values["greedy"] is not None:
            values["greedy"] = Interval(**values["greedy"])
        for by_value in values["groups"].values():
            for group in by_value.values():
                group["pass_at_k"] = _intervals(group["pass_at_k"])
        return cls(**values)


class MetricsMark(NamedTuple):
    """How far metrics.jsonl has been read: which file (inode), bytes and lines of it."""

    file: int
    end: int
    lines: int


def _intervals(values: Mapping[str, Mapping[str, float]]) -> dict[int, Interval]:
    return {int(k): Interval(**interval) for k, interval in values.items()}


def _key(result: EvaluationResult) -> tuple[str, str]:
    return clean_text(result.name), clean_text(result.label)


class RunFolder:
    """Reads and writes one run folder. Making the object touches no file; see the module."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stored: dict[int, tuple[weakref.ref[Image], str]] = {}

    # -- the run as a whole

    def create(
        self, config_yaml: str, versions: Mapping[str, Any], *, resume: bool = False
    ) -> RunFolder:
        """Make the folder, or with `resume` go on in one that holds a run.

        Raises RunFolderError if it cannot be written, or holds a run and `resume` is not set.
        """
        created = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with _explained(self.path, "making it"):
            if (self.path / "config.yaml").exists():
                if not resume:
                    raise RunFolderError(
                        f"run folder {self.path}: it holds a run already; resume that run, "
                        "delete the folder, or choose another run_dir"
                    )
                with suppress(OSError, ValueError):
                    earlier = json.loads((self.path / "versions.json").read_text("utf-8"))
                    created = {"created": earlier["created"]} if "created" in earlier else created
            self.path.mkdir(parents=True, exist_ok=True)
        self._write("versions.json", to_json(created | dict(versions), indent=2) + "\n")
        self._write("config.yaml", clean_text(config_yaml))
        return self

    def rewind(self, step: int) -> None:
        """Forget metrics and rollouts of steps after `step`: a resumed run writes them anew."""
        lines = [to_json(row) + "\n" for row in self.read_metrics() if row.get("step", 0) <= step]
        if lines or (self.path / "metrics.jsonl").exists():
            self._write("metrics.jsonl", "".join(lines))
        with _explained(self.path, "removing rollouts of later steps"):
            for later in self.rollout_steps():
                if later > step:
                    self._rollout_path(later).unlink()

    def read_config(self) -> str:
        """The resolved config as YAML text. Raises RunFolderError if there is no run here."""
        with _explained(self.path, "reading config.yaml"):
            if not (self.path / "config.yaml").is_file():
                raise RunFolderError(
                    f"run folder {self.path}: there is no run here (no config.yaml); give the "
                    "run_dir of a run"
                )
            return (self.path / "config.yaml").read_text("utf-8", errors="replace")

    def read_versions(self) -> dict[str, Any]:
        return self._read_json("versions.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", to_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Empty while the run is going on."""
        return self._read_json("summary.json")

    # -- metrics

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line. Numbers that are not finite are written as null."""
        line = (to_json(metrics) + "\n").encode()
        path = self.path / "metrics.jsonl"
        with _explained(self.path, f"writing {path.name}"), path.open("a+b", buffering=0) as file:
            end = _drop_torn_line(file)
            try:
                _write_all(file, line)
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines in order. A last line that is not whole (yet) is left out."""
        path = self.path / "metrics.jsonl"
        with _explained(self.path, f"reading {path.name}"):
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        rows = self._parse_metrics(lines[:-1], 0)
        with suppress(RunFolderError):  # a last line without its newline may be cut short
            rows += self._parse_metrics(lines[-1:], len(lines) - 1)
        return rows

    def follow_metrics(
        self, mark: MetricsMark | None = None
    ) -> tuple[list[dict[str, Any]], MetricsMark | None, bool]:
        """Lines finished since `mark`: their rows, the new mark, whether they are all there are.

        They are all if there was no mark, or if a resumed run has written the file anew.
        """
        path = self.path / "metrics.jsonl"
        with _explained(self.path, f"reading {path.name}"):
            if not path.exists():
                return [], None, True
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                anew = mark is None or mark.file != state.st_ino or mark.end > state.st_size
                start = MetricsMark(state.st_ino, 0, 0) if anew or mark is None else mark
                file.seek(start.end)
                content, newline, _ = file.read().rpartition(b"\n")
        lines = content.split(b"\n") if newline else []
        rows = self._parse_metrics(lines, start.lines)
        end = start.end + len(content) + len(newline)
        return rows, MetricsMark(start.file, end, start.lines + len(lines)), anew

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
                    f"run folder {self.path}: metrics.jsonl line {number} is damaged ({error}); "
                    "remove that line"
                ) from None
            rows.append({sys.intern(current_name(k)): value for k, value in row.items()})
        return rows

    # -- rollouts

    def write_rollouts(self, step: int, rows: Sequence[RolloutRecord]) -> None:
        """Write every completion of a step as one Parquet file (zstd), replacing an earlier one.

        `parts` and `meta` are stored as JSON text, so that any Parquet reader can show them.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds: dict[str, tuple[Callable[[Any], Any], Any]] = {
            "int": (int, pa.int64()),
            "number": (_number, pa.float64()),
            "bool": (bool, pa.bool_()),
            "text": (clean_text, pa.string()),
            "texts": (lambda texts: [clean_text(text) for text in texts], pa.list_(pa.string())),
            "json": (to_json, pa.string()),
        }
        columns = {}
        for name, kind in _COLUMNS.items():
            convert, arrow_type = kinds[kind]
            columns[name] = pa.array([convert(getattr(row, name)) for row in rows], arrow_type)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd", row_group_size=ROWS_PER_GROUP)
        self._write(str(self._rollout_path(step).relative_to(self.path)), buffer.getvalue())

    def read_rollouts(
        self, step: int, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The rows of a step as dicts with the names of RolloutRecord, in the order written.

        `columns` reads only these, `rows` only the rows at these places (from 0), in that order;
        both spare time and memory. Raises ValueError for a column that does not exist,
        RunFolderError if the step or such a row was not kept or its file is damaged.
        """
        with self._rollout_file(step, columns) as (file, stored):
            if rows is None:
                return _plain_rows(file.read(columns=stored).to_pylist())
            sizes = [
                file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
            ]
            if rows and not 0 <= min(rows) <= max(rows) < sum(sizes):
                raise RunFolderError(
                    f"run folder {self.path}: step {step} has been written anew; open it again"
                )
            found: dict[int, dict[str, Any]] = {}
            start = 0
            for index, size in enumerate(sizes):
                inside = sorted({row for row in rows if start <= row < start + size})
                if inside:
                    part = file.read_row_group(index, columns=stored)
                    part = part.take([row - start for row in inside])
                    found |= zip(inside, _plain_rows(part.to_pylist()), strict=True)
                start += size
            return [found[row] for row in rows]

    def iter_rollouts(
        self, step: int, columns: Sequence[str] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """The same rows, some hundred at a time: for steps too large to hold."""
        with self._rollout_file(step, columns) as (file, stored):
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=stored):
                yield _plain_rows(batch.to_pylist())

    @contextmanager
    def _rollout_file(
        self, step: int, columns: Sequence[str] | None
    ) -> Iterator[tuple[ParquetFile, list[str]]]:
        """The open file of a step and the names that it has for `columns`, by default all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        unknown = set(columns or ()) - set(_COLUMNS)
        if unknown:
            raise ValueError(f"no column {sorted(unknown)}; there are {', '.join(_COLUMNS)}")
        path = self._rollout_path(step)
        with _explained(self.path, f"reading {path.name}"):
            if not path.exists():
                steps = self.rollout_steps()
                kept = f"kept are {steps[0]} to {steps[-1]}" if steps else "none was kept"
                raise RunFolderError(f"run folder {self.path}: no rollouts of step {step}; {kept}")
            try:
                with pq.ParquetFile(path) as file:
                    stored = {current_name(name): name for name in file.schema_arrow.names}
                    missing = set(columns or _COLUMNS) - stored.keys()
                    if missing:
                        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
                    yield file, [stored[name] for name in columns or _COLUMNS]
            except (pa.ArrowException, ValueError, TypeError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the operating system's; Arrow's own, for damaged pages, have no number
                raise RunFolderError(
                    f"run folder {self.path}: {path.name} is damaged ({error}); delete it"
                ) from None

    def rollout_steps(self) -> list[int]:
        """Steps whose rollouts were kept, ascending."""
        names = [path.name for path in (self.path / "rollouts").glob("step_*.parquet")]
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)\.\w+", name)))

    def rollout_stamp(self, step: int) -> tuple[int, int]:
        """Changes whenever the rollouts of a step are written anew; (0, 0) if there are none."""
        try:
            state = self._rollout_path(step).stat()
        except OSError:
            return 0, 0
        return state.st_mtime_ns, state.st_size

    # -- pictures

    def store_image(self, image: Image) -> str:
        """Keep a picture, once however often it comes, and return its path in the run folder.

        The name is the SHA-256 of its pixels, so equal pictures share a file. The same object
        must not be changed between calls.
        """
        known = self._stored.get(id(image))
        if known is not None:
            return known[1]
        picture = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
        relative = f"images/{hashlib.sha256(content).hexdigest()[:16]}.png"
        if not (self.path / relative).exists():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            self._write(relative, buffer.getvalue())
        key = id(image)  # ids are used again: the entry goes with its picture
        forget = weakref.ref(image, lambda _: self._stored.pop(key, None))
        self._stored[key] = (forget, relative)
        return relative

    def image_path(self, relative: str) -> Path | None:
        """Where a stored picture lies; None if it is missing or not inside the run's images."""
        images = (self.path / "images").resolve()
        try:
            path = (self.path / relative).resolve()
            return path if images in path.parents and path.is_file() else None
        except (OSError, ValueError):  # a NUL, a name too long, a loop of links
            return None

    # -- evaluations

    def write_evaluation(
        self, result: EvaluationResult, samples: Iterable[SampleRecord | Mapping[str, Any]]
    ) -> Path:
        """Write a result with its samples, replacing an earlier one of the same name and label.

        The folder is called after the name; where that is taken, as by a second task evaluated
        under the same name, `<name>@<label>`.
        """
        name, label = _slug(result.name), _slug(result.label)
        digest = hashlib.sha256(clean_text(f"{result.name}\n{result.label}").encode()).hexdigest()
        places = (name, f"{name}@{label}", f"{name}@{label}-{digest[:8]}")
        folders = [self.path / "evaluations" / place for place in places]
        holders = {folder: self._read_result(folder) for folder in folders}
        own = [f for f, held in holders.items() if held and _key(held) == _key(result)]
        free = [f for f, held in holders.items() if held is None]
        folder = (own + free)[0]
        with _explained(self.path, f"writing the evaluation {result.name!r}"):
            # Without result.json the folder does not count: never new samples by an old result.
            for old in ("result.json", "samples.jsonl.gz"):
                (folder / old).unlink(missing_ok=True)
        write_jsonl(folder / "samples.jsonl", samples)
        write_atomic(folder / "result.json", result.to_json())
        return folder

    def read_evaluations(self) -> list[EvaluationResult]:
        """All results: "before" first, then by name, "after" last."""
        found = [self._read_result(folder) for folder in self._evaluation_folders()]
        results = [result for result in found if result is not None]
        order = {"before": 0, "after": 2}
        return sorted(results, key=lambda result: (order.get(result.name, 1), result.name))

    def read_samples(self, result: EvaluationResult) -> Iterator[dict[str, Any]]:
        """The samples of an evaluation one by one, as dicts with the names of SampleRecord."""
        path = self.samples_path(result)
        if path is None:
            return
        with _explained(self.path, f"reading {path.name}"), open_samples(path) as file:
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
        for folder in self._evaluation_folders():
            held = self._read_result(folder)
            if held is not None and _key(held) == _key(result):
                packed = folder / "samples.jsonl.gz"
                return packed if packed.is_file() else folder / "samples.jsonl"
        return None

    def _evaluation_folders(self) -> list[Path]:
        return sorted(path.parent for path in self.path.glob("evaluations/*/result.json"))

    def _read_result(self, folder: Path) -> EvaluationResult | None:
        path = folder / "result.json"
        with _explained(self.path, f"reading {path}"):
            if not path.exists():
                return None
            try:
                return EvaluationResult.from_json(path.read_text("utf-8"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunFolderError(f"{path}: damaged ({error!r}); delete its folder") from None

    # -- files

    def _rollout_path(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.parquet"

    def _write(self, relative: str, content: str | bytes) -> None:
        path = self.path / relative
        with _explained(self.path, f"writing {relative}"), _replacing(path) as file:
            file.write(_as_bytes(content))

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        with _explained(self.path, f"reading {name}"):
            if not path.exists():
                return {}
            try:
                values = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise RunFolderError(f"{path}: not valid JSON ({error}); delete it") from None
        return values if isinstance(values, dict) else {}


_COLUMNS = {
    "step": "int",
    "resample_round": "int",
    "prompt_index": "int",
    "completion_index": "int",
    "example_id": "text",
    "question": "text",
    "prompt_text": "text",
    "answer": "text",
    "images": "texts",
    "completion": "text",
    "tokens": "int",
    "finish_reason": "text",
    "reward": "number",
    "success": "bool",
    "parts": "json",
    "error": "text",
    "advantage_before": "number",
    "advantage_sample_level": "number",
    "advantage": "number",
    "entropy": "number",
    "meta": "json",
}


def _plain_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            current_name(name): json.loads(value) if name in ("parts", "meta") else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def clean_text(value: Any) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, single surrogates as U+FFFD."""
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of any value: numbers that are not finite become null, unknown objects their text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return clean_text(value)


def open_samples(path: Path) -> io.BufferedIOBase:
    """The lines of samples.jsonl, packed or not."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses or mappings as JSON lines, atomically. Raises RunFolderError."""
    with _explained(path.parent, f"writing {path.name}"), _replacing(path) as file:
        for row in rows:
            values = row if isinstance(row, Mapping) else asdict(row)
            file.write((to_json(values) + "\n").encode())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or leave what was there. Raises RunFolderError."""
    with _explained(path.parent, f"writing {path.name}"), _replacing(path) as file:
        file.write(_as_bytes(content))


def _as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` only once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _write_all(file: IO[bytes], data: bytes) -> None:
    """An unbuffered file may take less than it is given, as when the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _drop_torn_line(file: IO[bytes]) -> int:
    """Cut off a last line that a killed writer left unfinished; return the file's length."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return 0
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    return end


def _slug(name: str) -> str:
    """A name that is safe as a folder of its own: no separators, no leading dot."""
    return re.sub(r"[^\w.+=-]+", "-", clean_text(name)).lstrip(".")[:100] or "unnamed"


@contextmanager
def _explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system refuses into a RunFolderError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "disk or quota is full: free some space and resume; what was written is intact"
            with suppress(OSError):
                advice += f" ({shutil.disk_usage(folder).free >> 20} MB free)"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "it is read-only here: choose another run_dir or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = "a file stands in the way: choose another run_dir or move that file"
        else:
            advice = "choose another run_dir or mend the cause"
        reason = error.strerror or str(error)
        raise RunFolderError(f"run folder {folder}: {doing} failed ({reason}); {advice}") from error


def summarise_evaluations(run: RunFolder, label: str) -> dict[str, Any]:
    """pass@k and greedy accuracy of every evaluation of one task, for the run's summary."""
    found = [result for result in run.read_evaluations() if result.label == label]
    return {
        "pass_at_k": {
            result.name: {k: asdict(interval) for k, interval in result.pass_at_k.items()}
            for result in found
        },
        "greedy": {result.name: asdict(result.greedy) for result in found if result.greedy},
    }
