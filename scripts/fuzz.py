"""Feeds malformed input to everything that reads files or text from outside, and looks for crashes.

    python scripts/fuzz.py                     # hypothesis alone
    pip install atheris && python scripts/fuzz.py --cases 5000 --atheris 1000
    python scripts/fuzz.py --target checkpoint --cases 200

Every case must end within 10 seconds in a result or in one of our own errors (`UserError`).
Hypothesis draws cases at random; atheris, if installed, steers the same generators by the lines of
this package that a case has reached. A line per target counts the faults; each kind of fault is
shown once, with its input.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mm_agrae import config as configs
from mm_agrae.errors import UserError
from mm_agrae.model import compat

ROOT = Path(__file__).parent.parent
LIMIT_S = 10
LIMIT_GIB = 16

# ------------------------------------------------------------------------ what cases are made of

TEXT = st.text(st.characters(), max_size=40)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([2**63, 10**30, -1, 0.5, 1e308, "", "\x00", "\ud800", "../..", "é" * 300])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.sampled_from(["path", "bytes"]), inner, max_size=4)
    ),
    max_leaves=8,
)
# An alias that doubles at every step: 2^24 values in a line.
_DOUBLED = ",".join(f"&{b} [*{a},*{a}]" for a, b in pairwise("abcdefghijklmnopqrstuvwx"))
_YAML = r"""2020-13-45 | 2020-01-01 | &a [*a] | &a {b: *a} | *nothing | 0b | 0x | 0o9 | 1:2:3
190:20:30.15 | 1_0 | 1e-6 | 1e400 | .inf | .nan | ~ | !!int x | !!float x | !!int | !!bool x
!!timestamp x | !!binary x | !!python/object/apply:os.getcwd [] | !x y | = | {? [a] : b}
{? {a: b} : c} | {1: 2, a: b} | {null: 1} | <<: 1 | {<<: [1]} | [ | { | "\ud800"
"\x00" | ' | % | @ | ` | - a
a: b: c | !!set {a, b} | !!omap [a: 1] | !!pairs [a: 1] | &a 1 | ?"""
YAML = st.sampled_from(
    [*_YAML.replace("\n", " | ").split(" | "), "|", "\t", "9" * 5000, "[" * 400, "{a: " * 400,
     f"[&a 1,{_DOUBLED}]"]
)  # fmt: skip


def damaged_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` cut short, with some bytes changed, with bytes inserted, or unrelated bytes."""

    def change(edits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(data)
        for offset, value in edits:
            changed[offset % len(changed)] = value
        return bytes(changed)

    offset = st.integers(0, len(data))
    near_start = st.integers(0, min(len(data), 2000))
    return (
        st.builds(lambda end: data[:end], offset)
        | st.lists(st.tuples(near_start | offset, st.integers(0, 255)), min_size=1, max_size=8).map(change)
        | st.builds(lambda at, piece: data[:at] + piece + data[at:], offset, st.binary(max_size=20))
        | st.binary(max_size=200)
    )


# --------------------------------------------------------------------------------- the config


CONFIG = {
    "run_dir": "runs/a",
    "model": {"path": "m", "lora": {"rank": 4, "parts": ["language"]}},
    "data": {"train": [{"task": "synthetic"}], "evaluate": [{"task": "files", "samples": 2}]},
    "train": {"steps": 2},
    "rollout": {"prompts_per_step": 4, "vllm": {"options": {}}, "mismatch": {}},
    "reward": {"parts": {"accuracy": 0.9, "format": 0.1}, "overlong": {"buffer_tokens": 4}},
    "advantage": {"rule": "agrae", "alpha": 0.5},
    "update": {"betas": [0.9, 0.99]},
    "checkpoint": {"every": 1},
}


def _keys(values: Any, prefix: str = "") -> list[str]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found = []
    for key, value in items:
        found.append(f"{prefix}{key}")
        if isinstance(value, dict | list):
            found += _keys(value, f"{prefix}{key}.")
    return found


KEYS = st.sampled_from(
    [*_keys(CONFIG), "base", "a", "", ".", "model..path", "data.train.-1", "data.train.1", "log.sinks"]
)
OVERRIDES = st.builds("{}={}".format, KEYS | TEXT, YAML | TEXT | SCALARS.map(str)) | TEXT
PLAUSIBLE = st.sampled_from([1, 2, 8, 0, 0.5, 1.0, True, False, "auto", "x", "a/b", None, [], {}])
REPLACEMENTS = st.lists(st.tuples(KEYS, PLAUSIBLE | VALUES), max_size=3)
GOOD_OVERRIDES = st.sampled_from(["train.steps=3", "advantage.alpha=1", "model.path=x", "run_dir=r"])


def _config_text(replacements: list[tuple[str, Any]]) -> bytes:
    """A good config with some values replaced."""
    values = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in replacements:
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            if isinstance(node, list):
                node = node[0] if node and parent == "0" else None
            elif isinstance(node, dict):
                node = node.get(parent)
        if isinstance(node, dict):
            node[last] = value
    return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")


GOOD_CONFIG = yaml.safe_dump(CONFIG).encode()
CONFIG_FILES = (
    st.just(GOOD_CONFIG)
    | REPLACEMENTS.map(_config_text)
    | st.builds(lambda key, text: GOOD_CONFIG + f"\n{key}: {text}\n".encode(), KEYS, YAML)
    | (YAML | TEXT.map(json.dumps)).map(lambda text: f"base: {text}".encode())
    | YAML.map(str.encode)
    | damaged_bytes(GOOD_CONFIG)
)
CONFIGS = st.tuples(CONFIG_FILES, st.lists(GOOD_OVERRIDES, max_size=2) | st.lists(OVERRIDES, max_size=2))


def read_config(case: tuple[bytes, list[str]]) -> None:
    content, overrides = case
    path = workshop() / "config.yaml"
    path.write_bytes(content)
    config = configs.load(path, overrides)
    # What is accepted can be written, and read back as it was.
    text = configs.dump(config)
    path.write_text(text, encoding="utf-8")
    again = configs.load(path)
    assert again == config or "nan" in text, "a config that changes by being saved"
    configs.plan(config, train_rows=10)


# ---------------------------------------------------------------------------------- the files

FIELDS = [
    "question", "problem", "answer", "images", "image", "choices", "options", "id", "solution",
]  # fmt: skip
QUESTIONS = TEXT | st.sampled_from(["What?", "<image> What?", "<image 2><image1>", "(A) 1 (B) 2"])
GOOD_ROWS = st.fixed_dictionaries(
    {"question": QUESTIONS, "answer": st.sampled_from(["5", "A", 7, 2.5])},
    optional={"choices": st.lists(TEXT, min_size=2, max_size=3), "image": st.binary(max_size=40)},
)
ROWS = (
    GOOD_ROWS
    | st.fixed_dictionaries(
        {},
        optional={
            "question": QUESTIONS | VALUES,
            "answer": st.sampled_from(["5", "A", "B, C", 5, 5.0, True]) | VALUES,
            "choices": st.lists(TEXT | SCALARS, max_size=5) | VALUES,
            "images": st.lists(TEXT, max_size=3) | VALUES,
            "image": st.binary(max_size=40) | VALUES,
            "id": VALUES,
        },
    )
    | st.dictionaries(st.sampled_from(FIELDS) | TEXT, VALUES, max_size=5)
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "split": st.sampled_from(["", "train", "test"]) | SCALARS,
        "subset": st.sampled_from(["", "a"]) | SCALARS,
        "columns": st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(FIELDS) | VALUES) | VALUES,
        "where": st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2) | VALUES,
        "grading": st.dictionaries(st.sampled_from(["kind", "choices", "tolerance"]), VALUES),
        "show_choices": st.booleans(),
        "answer_after": TEXT | st.just("####"),
        "image_root": TEXT,
        "meta": st.lists(st.sampled_from(FIELDS) | TEXT, max_size=2).map(tuple),
        "limit": st.integers(1, 3),
        "samples": SCALARS,
    },
)
NAMES = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "d/train.jsonl", "d/dataset_info.json"])


def _table(name: str, rows: list[Any]) -> bytes:
    """Rows in the format that the name stands for, as far as it can hold them."""
    suffix = Path(name).suffix
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            sink = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
            return sink.getvalue().to_pybytes()
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            return b"PAR1"
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        lines = [mark.join(map(str, rows[0]))] if rows and isinstance(rows[0], dict) else []
        lines += [mark.join(map(str, row.values())) for row in rows if isinstance(row, dict)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    texts = [json.dumps(row, default=lambda data: data.decode("latin-1")) for row in rows]
    whole = f"[{','.join(texts)}]" if suffix == ".json" else "\n".join(texts)
    return whole.encode("utf-8", "surrogatepass")


@st.composite
def _files(draw: Any) -> tuple[str, bytes, dict[str, Any], bool]:
    name = draw(NAMES)
    rows = st.lists(GOOD_ROWS, max_size=4) | st.lists(ROWS | VALUES, max_size=4)
    content = _table(name, draw(rows))
    if content and draw(st.integers(0, 3)) == 0:
        content = draw(damaged_bytes(content))
    return name, content, draw(st.just({}) | OPTIONS), draw(st.booleans())


def read_files(case: tuple[str, bytes, dict[str, Any], bool]) -> None:
    from pydantic import ValidationError

    from mm_agrae.tasks import load_all
    from mm_agrae.tasks.images import open_image

    name, content, options, skip = case
    with tempfile.TemporaryDirectory(dir=workshop()) as folder:
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        where = path if path.parent == Path(folder) else path.parent
        try:
            source = configs.DataSource(task="files", path=str(where), **options)
        except ValidationError:  # where the config loader says it in its own words
            return
        task = load_all([source], on_bad_row="skip" if skip else "error")
        for index in range(len(task)):
            example = task[index]
            for image in example.images:
                try:
                    open_image(image, origin=example.origin)
                except UserError:
                    continue


# --------------------------------------------------------------------------- answers, grading

_PIECES = r"""
\boxed{ \boxed \fbox{ } { $ $$ \( \) \[ \] <think> </think> <answer> </answer> #### 12 -3 1/2
\frac{1}{2} \frac{ \dfrac12 \sqrt{2} \sqrt[ x x^2 + = , . (A) B. yes no % ° \pi 1e9 1,000 0.333
[1,2) (1,2) \{1,2\} \cup \infty \begin{pmatrix} \\ & \end{pmatrix} \pm ^{ _{ ! \binom{9}{5} \sin |
because 答案是 √ ½ ２ − \ <|im_end|> ** ` # \left( \right) 10^{10^{10}} __import__('os') lambda
"""
PIECES = st.sampled_from(
    [
        *_PIECES.split(),
        *(" ", "\n", " and ", " or ", " cm", r"\text{ cm}", "answer is ", "Final answer: "),
        *("\u202e", "\ud800", "\x00", "9" * 400, "(" * 60, "{" * 60),
    ]
)
WRITTEN = st.lists(PIECES | TEXT, max_size=12).map("".join)
ANSWERS = st.tuples(
    WRITTEN, WRITTEN, st.sampled_from(["auto", "math", "number", "choice", "yes_no", "text"]),
    st.lists(WRITTEN, max_size=4), st.booleans(),
)  # fmt: skip


def read_answer(case: tuple[str, str, str, list[str], bool]) -> None:
    from mm_agrae.grading.accuracy import verify
    from mm_agrae.grading.extraction import extract_answer, final_answer
    from mm_agrae.rewards.parts import follows_format

    gold, completion, kind, choices, thinking = case
    found = extract_answer(completion, after_thinking=thinking)
    assert found is None or isinstance(found, str)
    final_answer(gold)
    follows_format(completion)
    correct = verify(gold, completion, kind=kind, choices=choices, after_thinking=thinking, time_limit_s=0.5)  # type: ignore[arg-type]
    assert isinstance(correct, bool)


# --------------------------------------------------------------------------- the checkpoint


@lru_cache
def _whole_checkpoint() -> tuple[Path, Any]:
    """A checkpoint of the embedded text model, and a policy that it fits."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import TEXT as MODEL
    from helpers import policy, processing, run_config

    from mm_agrae.run import checkpoint

    made = policy(MODEL)
    optimizer = torch.optim.AdamW(made.trainable_parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    snapshot = checkpoint.Snapshot(
        made,
        processing(MODEL),
        config=run_config(workshop() / "run", MODEL),
        card="# A card\n",
        state=dict.fromkeys(checkpoint.COUNTS, 1) | {"seconds": {}, "versions": {}},
        training={"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()},
    )
    folder = workshop() / "checkpoints" / "step_000001"
    snapshot.write(folder)
    return folder, made


@st.composite
def _checkpoints(draw: Any) -> tuple[dict[str, bytes | None], bool]:
    """New contents of some of its files (None: gone), and whether the checksums are updated."""
    folder, _ = _whole_checkpoint()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    likely = ["mm_agrae.json", "training.pt", "model.safetensors", "mm_agrae.yaml"]
    changes: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(likely) | st.sampled_from(names), max_size=2)):
        old = (folder / name).read_bytes()
        changes[name] = draw(st.none() | damaged_bytes(old) | damaged_bytes(old))
        if name.endswith(".json") and draw(st.booleans()):
            values = json.loads(old)
            values[draw(st.sampled_from(sorted(values)) | TEXT)] = draw(VALUES)
            changes[name] = json.dumps(values).encode("utf-8", "surrogatepass")
    return changes, draw(st.booleans())


def read_checkpoint(case: tuple[dict[str, bytes | None], bool]) -> None:
    import hashlib

    import torch

    from mm_agrae.run import checkpoint

    changes, updated = case
    whole, policy = _whole_checkpoint()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=workshop()) as parent:
        folder = Path(parent, whole.name)
        shutil.copytree(whole, folder, copy_function=os.link)
        for name, content in changes.items():
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
        if updated and "mm_agrae.json" not in changes:
            state = json.loads((folder / "mm_agrae.json").read_text())
            for name, content in changes.items():
                state["sha256"][name] = hashlib.sha256(content or b"").hexdigest()
            (folder / "mm_agrae.json").unlink()
            (folder / "mm_agrae.json").write_text(json.dumps(state))
        checkpoint.candidates(folder.parent)
        checkpoint.newest(folder.parent)
        try:
            if not checkpoint.damaged(folder):
                configs.load(folder / checkpoint.CONFIG_FILE)
            state, training = checkpoint.restore(folder, policy)
        except UserError:
            after = policy.model.state_dict()
            same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
            assert same, "a checkpoint that was refused has changed the weights"
            raise
        finally:
            policy.model.load_state_dict(before)
        sum(state["seconds"].values(), 0.0)
        state["versions"].items()
        assert training.keys() >= {"optimizer", "scheduler"}


# ---------------------------------------------------------------------------- running cases

Check = Callable[[Any], None]
TARGETS: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Check]] = {
    "config": (lambda: CONFIGS, read_config),
    "files": (_files, read_files),
    "answers": (lambda: ANSWERS, read_answer),
    "checkpoint": (_checkpoints, read_checkpoint),
}


class TooLong(BaseException):
    """A case that hangs. Not an Exception, so that no handler swallows it."""


@dataclass
class Tally:
    """What has been tried on a target, and each kind of fault with one input that shows it."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)

    def attempt(self, check: Check, case: Any) -> None:
        def strike(number: int, frame: Any) -> None:
            raise TooLong(f"longer than {LIMIT_S} s")

        self.cases += 1
        started = time.perf_counter()
        earlier = signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            check(case)
        except UserError as error:
            self.refused += 1
            if not str(error):
                self.faults["silent"] = f"an error without a message\n    input: {case!r:.1000}"
        except (Exception, TooLong) as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "mm_agrae" in f.filename] or frames
            where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
            kind = f"{type(error).__name__} in {where}: {str(error)[:100]}"
            self.faults.setdefault(kind.split(": ")[0], f"{kind}\n    input: {case!r:.1000}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)
        self.slowest = max(self.slowest, time.perf_counter() - started)


@lru_cache
def workshop() -> Path:
    return Path(tempfile.mkdtemp(prefix="mm-agrae-fuzz-"))


def drawn(target: str, tally: Tally, cases: int, start: int = 0) -> Any:
    """A hypothesis test that tries `cases` inputs for the target."""
    strategy, check = TARGETS[target]

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy())
    def run(case: Any) -> None:
        tally.attempt(check, case)

    return run


def fuzz(target: str, cases: int, start: int = 0) -> Tally:
    """Try `cases` inputs that hypothesis draws."""
    tally = Tally()
    _quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn(target, tally, cases, start)()
    finally:
        shutil.rmtree(workshop(), ignore_errors=True)
        workshop.cache_clear()
        _whole_checkpoint.cache_clear()
    return tally


def _quiet() -> None:
    """No progress bars for thousands of checkpoints."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def steered(target: str, cases: int, report: Path) -> None:
    """The same, steered by coverage. Does not return: libFuzzer ends the process."""
    tally = Tally()
    run = drawn(target, tally, cases)

    def one(data: bytes) -> None:
        run.hypothesis.fuzz_one_input(data)
        if tally.cases % 100 == 0 or tally.cases >= cases:
            report.write_text(json.dumps(vars(tally)))
        if tally.cases >= cases:
            shutil.rmtree(workshop(), ignore_errors=True)
            os._exit(0)

    import atheris

    _quiet()
    warnings.simplefilter("ignore")
    # An initial corpus: from nothing, libFuzzer takes long to find complete cases.
    corpus = workshop() / "corpus"
    corpus.mkdir()
    for number in range(100):
        (corpus / str(number)).write_bytes(random.Random(number).randbytes(50 * (number + 1)))
    atheris.Setup(["fuzz", "-max_len=8192", "-len_control=0", "-rss_limit_mb=0", str(corpus)], one)
    atheris.Fuzz()


# What steers must be imported under atheris' instrumentation.
STEERED = """
import sys, atheris
from pathlib import Path
from mm_agrae.model.compat import prepare
prepare()
with atheris.instrument_imports(include=["mm_agrae"]):
    import mm_agrae.run.checkpoint, mm_agrae.config, mm_agrae.grading.accuracy, mm_agrae.tasks.files
import fuzz
fuzz.steered(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
"""


def with_atheris(target: str, cases: int) -> Tally:
    """In a process of its own: a crash below Python is a fault too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", STEERED, target, str(cases), str(report)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        if not report.exists():
            return Tally(faults={"crash": f"the process ended with {done.returncode}:\n{done.stderr}"})
        tally = Tally(**json.loads(report.read_text()))
        if done.returncode:
            tally.faults["crash"] = f"the process ended with {done.returncode}:\n{done.stderr[-2000:]}"
        return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--cases", type=int, default=3000, help="hypothesis cases a target")
    parser.add_argument("--atheris", type=int, default=0, help="cases steered by coverage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.atheris and find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install atheris")
    # A case that asks for too much memory is a fault, and must not take the machine down.
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GIB << 30, LIMIT_GIB << 30))
    rows, bad = [], 0
    for target in args.target or TARGETS:
        for engine, cases in (("hypothesis", args.cases), ("atheris", args.atheris)):
            if not cases:
                continue
            started = time.perf_counter()
            by_seed = engine == "hypothesis"
            tally = fuzz(target, cases, args.seed) if by_seed else with_atheris(target, cases)
            spent = time.perf_counter() - started
            rows.append((target, engine, tally.cases, tally.refused, spent, tally.slowest))
            bad += len(tally.faults)
            print(
                f"{target:11} {engine:11} {tally.cases:6} cases  {tally.refused:6} refused  "
                f"{spent:7.1f} s  slowest {tally.slowest:5.2f} s  {len(tally.faults)} faults",
                flush=True,
            )
            for fault in tally.faults.values():
                print(f"  FAULT {fault}", flush=True)
    print(f"{sum(row[2] for row in rows):,} cases, {bad} faults")
    return min(bad, 1)


if __name__ == "__main__":
    compat.prepare()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
