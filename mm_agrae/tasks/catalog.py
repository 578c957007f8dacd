"""Published data sets by name.

    - {task: geometry3k, split: test}
    - {task: math, split: train, path: /data/math, where: {level: [4, 5]}}

To add one, put an entry into `CATALOG`; `published.py` finds and reads it.

`rows` are the row counts of the hub's copies. Columns and splits are taken from the data cards and
from programs that use them. For aime2025 and amc23 the file names and columns come from such
programs alone, and nobody has compared `expected_answer` of zwhe99/MATH with the boxed answers row
by row. A column with another name is an error that lists the columns.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from mm_agrae.tasks.picture_operators import Operator
from mm_agrae.tasks.published import CatalogEntry, CatalogTask, task_class
from mm_agrae.tasks.rows import TableRow
from mm_agrae.types import Example


def _geometry3k(row: TableRow) -> TableRow:
    if isinstance(problem := row.get("problem"), str):
        return {**row, "problem": problem.removeprefix("<image>").lstrip()}
    return row


def _math(row: TableRow) -> TableRow:
    level = re.fullmatch(r"Level ([0-9])", str(row.get("level")))
    return {"subject": row.get("type"), **row, **({"level": int(level[1])} if level else {})}


def _gsm8k(row: TableRow) -> TableRow:
    """The answer is what follows the last ####, its thousands without commas, and what comes before it the solution,
    without the calculator's <<1+1=2>>."""
    if isinstance(answer := row.get("answer"), str):
        steps, _, answer = answer.rpartition("####")
        solution = re.sub("<<[^<>]*>>", "", str(row.get("solution") or steps)).strip()
        row = {**row, "answer": answer.replace(",", "").strip(), **({"solution": solution} if solution else {})}
    return row


def _integer(row: TableRow) -> TableRow:
    """Answers such as 027 or 27.0 are the integer 27."""
    found = re.fullmatch(r"\s*(-?)0*([0-9]+)(?:\.0*)?\s*", str(row.get("answer")))
    return {**row, "answer": found[1] + found[2]} if found else row


def _mathverse(row: TableRow) -> TableRow:
    """The hub's questions end in lines "Choices:", "A:40°", …; these become a list."""
    question, metadata = row.get("question"), row.get("metadata")
    more = dict(metadata) if isinstance(metadata, Mapping) else {}
    if isinstance(question, str) and "choices" not in row:
        text, found, lines = question.rpartition("Choices:\n")
        choices = re.split(r"\n(?=\(?[B-Z][:).])", lines.strip()) if found else []
        if len(choices) > 1 and re.match(r"\(?A[:).]", choices[0]):
            more |= {"question": text.rstrip("\n"), "choices": choices}
    return {**row, **more}


def _vqa_rad(row: TableRow) -> TableRow:
    """Adds `answer_type` where a copy has none: yes and no are closed."""
    answer = str(row.get("answer")).strip().lower()
    return {"answer_type": "closed" if answer in ("yes", "no") else "open", **row}


def _medical_kind(answer: str) -> str:
    """Yes or no by the first word, measurements as numbers with units, the rest as text."""
    if answer.strip(" .").lower() in ("yes", "no"):
        return "yes_no"
    measurement = re.fullmatch(r"[0-9]+([.,][0-9]+)?\s*(%|[mc]?m|ml|g|kg)?", answer.strip(" ."))
    return "number" if measurement else "text"


def _hub(split: str) -> str:
    return f"data/{split}-*.parquet"


def _files(*splits: str, folder: str = "data") -> dict[str, tuple[str, ...]]:
    """The usual names of files."""
    return {split: (f"{split}.jsonl", f"{folder}/{split}-*.parquet") for split in splits}


CATALOG: dict[str, CatalogEntry] = {
    "geometry3k": CatalogEntry(
        hub="hiyouga/geometry3k",
        files=_files("train", "validation", "test")
        | {"validation": ("val.jsonl", "validation.jsonl", _hub("validation"))},
        rows={"train": 2101, "validation": 300, "test": 601},
        licence="MIT",
        url="https://github.com/lupantech/InterGPS",
        prepare=_geometry3k,
        ask={
            "value": {"answer": ("answer_value", "answer"), "choices": ()},
            "letter": {"answer": ("ground_truth", "answer")},
        },
    ),
    "math": CatalogEntry(
        hub="zwhe99/MATH",
        files={
            "train": ("train.jsonl", _hub("train")),
            "test": ("math500.jsonl", _hub("math500")),
            "test_rest": ("test_rest.jsonl", _hub("math4500")),
        },
        rows={"train": 7500, "test": 500, "test_rest": 4500},
        licence="MIT",
        url="https://github.com/hendrycks/math",
        columns={"answer": ("expected_answer", "answer")},
        prepare=_math,
        saved_as={"test": "math500", "test_rest": "math4500"},
    ),
    "math500": CatalogEntry(
        hub="HuggingFaceH4/MATH-500",
        files={"test": ("math500.jsonl", "test.jsonl", _hub("math500"), _hub("test"))},
        rows={"test": 500},
        licence="MIT",
        url="https://github.com/openai/prm800k",
        columns={"answer": ("expected_answer", "answer")},
        prepare=_math,
        folders=("math500", "math"),
    ),
    "gsm8k": CatalogEntry(
        hub="openai/gsm8k",
        files=_files("train", "test", folder="main"),
        rows={"train": 7473, "test": 1319},
        licence="MIT",
        url="https://github.com/openai/grade-school-math",
        prepare=_gsm8k,
    ),
    "aime2024": CatalogEntry(
        hub="HuggingFaceH4/aime_2024",
        files={"test": ("test.jsonl", _hub("train"))},
        rows={"test": 30},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AIME_Problems_and_Solutions",
        prepare=_integer,
        saved_as={"test": "train"},
    ),
    "aime2025": CatalogEntry(
        hub="math-ai/aime25",
        files={"test": ("test.jsonl",)},
        rows={"test": 30},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AIME_Problems_and_Solutions",
        prepare=_integer,
    ),
    "amc23": CatalogEntry(
        hub="math-ai/amc23",
        files={"test": ("test.jsonl", "test-*.parquet", _hub("test"))},
        rows={"test": 40},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AMC_12_Problems_and_Solutions",
        prepare=_integer,
    ),
    "mathvision": CatalogEntry(
        hub="MathLLMs/MathVision",
        files={
            "test": ("test.jsonl", "test_subset.jsonl", _hub("test")),
            "testmini": ("testmini.jsonl", "test_subset.jsonl", _hub("testmini")),
        },
        rows={"test": 3040, "testmini": 304},
        licence="MIT",
        url="https://github.com/mathllm/MATH-V",
        columns={"images": ("decoded_image", "images", "image")},
        split_where={"testmini": {"testmini": True}},
    ),
    "mathverse": CatalogEntry(
        hub="AI4Math/MathVerse",
        files={
            "testmini": ("testmini.parquet", "testmini.jsonl", "testmini_subset.jsonl"),
            "testmini_text_only": ("testmini_text_only.parquet", "testmini_text_only.jsonl", "testmini_subset.jsonl"),
        },
        rows={"testmini": 3940, "testmini_text_only": 788},
        licence="MIT",
        url="https://github.com/ZrrSkywalker/MathVerse",
        columns={"id": ("id", "sample_index")},
        prepare=_mathverse,
        split_where={"testmini_text_only": {"problem_version": "Text Only"}},
    ),
    "vqa_rad": CatalogEntry(
        hub="flaviagiammarino/vqa-rad",
        files=_files("train", "test"),
        rows={"train": 1793, "test": 451},
        licence="CC0 1.0",
        url="https://osf.io/89kps/",
        prepare=_vqa_rad,
        kind=_medical_kind,
    ),
}

_VERSIONS = {
    "Text Only": -2,
    "Text Dominant": -2,
    "Text Lite": 0,
    "Vision Intensive": 1,
    "Vision Dominant": 2,
    "Vision Only": 4,
}
"""MathVerse's versions of a problem, and how much harder each is than with the text that most need, in steps of D."""


class _MathVerse(CatalogTask):
    variant_names = (*_VERSIONS,)

    @cached_property
    def _groups(self) -> dict[Any, list[tuple[str, Example]]]:
        """Problem -> its versions in this split."""
        found: dict[Any, list[tuple[str, Example]]] = defaultdict(list)
        for index in range(len(self)):
            found[self._group(example := self[index])].append((str(example.columns.get("problem_version")), example))
        return found

    def _group(self, example: Example) -> Any:
        return example.columns.get("group", example.columns.get("problem_index"))

    def variants(self, index: int) -> list[Operator]:
        """The other versions of the same problem."""
        own = self[index]
        base = _VERSIONS.get(str(own.columns.get("problem_version")), 0)
        group = self._groups[self._group(own)] if self._group(own) is not None else []
        return [
            Operator(version, _VERSIONS[version] - base, lambda _: True, lambda *_, other=other: other)
            for version, other in group
            if version in _VERSIONS and other.id != own.id
        ]


_OWN_CLASS = {"mathverse": _MathVerse}
TASKS = {name: task_class(name, entry, _OWN_CLASS.get(name, CatalogTask)) for name, entry in CATALOG.items()}
