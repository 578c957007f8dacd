"""Tables of questions and answers: files, folders, Hugging Face data sets.

    - task: files
      path: data/downloads/geometry3k/train.jsonl
      columns: {answer: answer_value, choices: null}

Accepted are JSONL, JSON (a list of objects), CSV, TSV and Parquet files, a folder of such files, a
folder written by `datasets.save_to_disk`, and the id of a data set on the Hugging Face hub. Every
row is checked when the task is made. Of images only the existence is checked; they are decoded when
the row is processed. Messages count lines of JSONL and CSV from 1 and rows of other formats from 0.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mm_agrae.config.plugins import check_arguments, is_import_name
from mm_agrae.errors import ConfigError, DataError, nearest
from mm_agrae.tasks.images import find_file
from mm_agrae.tasks.rows import LazyRow, TableRow, listing, read_rows, show
from mm_agrae.types import Example, ImageSource

COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("problem", "question", "prompt"),
    "answer": ("answer", "solution", "target"),
    "images": ("images", "image"),
    "choices": ("choices", "options"),
    "id": ("id", "unique_id"),
}
"""Fields of an example, and the columns each is looked for in (also as Problem and PROBLEM)."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKER = re.compile(r"<image ?([0-9]{0,3})>")

ColumnName = str | Sequence[str] | None


class FileTask:
    """Examples from the rows of files.

    `path`: a file, a folder or a hub id; `split` and `subset` choose among the files of a folder
    or the parts of a hub data set.
    `columns`: which column each of question, answer, images, choices and id is read from, for
    instance `{question: query}`; null turns a field off. `images` and `choices` also take a list
    of columns, for tables with one column per image or choice.
    `where`: keep only rows with these values, such as `{answer_type: closed, level: [4, 5]}`.
    `grading`: arguments of `grading.accuracy.verify` for every row. Rows with choices are graded
    as `{"kind": "choice", "choices": [...]}`, which these override. With
    `grader: "module:function"` that function grades instead (see `rewards.parts.accuracy`) and
    receives the other keys as they are.
    `show_choices`: append the choices to the question as lines "(A) …", unless it has them.
    `answer_after`: the answer is what follows the last occurrence of this text, such as "####"
    for GSM8K.
    `image_root`: folder that all images must lie in; not set: the folder of the data file.
    `meta`: columns carried into the rollout records.
    `limit`: stop after so many examples. `on_bad_row`: raise, or leave the row out and put the
    reason into `skipped`.

    Raises ConfigError for a wrong option, DataError that names file and row for a bad row or
    for data that cannot be read.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "",
        subset: str = "",
        columns: Mapping[str, ColumnName] | None = None,
        where: Mapping[str, Any] | None = None,
        grading: Mapping[str, Any] | None = None,
        show_choices: bool = True,
        answer_after: str = "",
        image_root: str | None = None,
        meta: Sequence[str] = (),
        limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ):
        self.split, self.subset = split, subset
        self.columns = dict(columns or {})
        self.where = dict(where or {})
        self.grading = dict(grading or {})
        self.check_options({"columns": self.columns, "grading": self.grading})
        self.show_choices, self.answer_after = show_choices, answer_after
        self.image_root, self.meta = image_root, tuple(meta)
        self.skipped: list[str] = []
        self._rows: list[LazyRow] = []
        # An image file is looked up once, however many rows and epochs use it.
        self._find_file = lru_cache(maxsize=None)(find_file)

        seen: dict[str, None] = {}
        for lazy in self._read_rows(path):
            if len(self._rows) == limit:
                break
            try:
                row = self._prepare(lazy.read())
                seen.update(dict.fromkeys(row))
                if self._wanted(row, lazy.origin):
                    self._example(row, lazy)
                    self._rows.append(lazy)
            except DataError as error:
                if on_bad_row == "error":
                    raise DataError(f"{error}; fix it or set data.on_bad_row=skip") from None
                self.skipped.append(str(error))
        self._check_found(path, list(seen))

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Check the nested options. Raises ConfigError naming the key."""
        from mm_agrae.grading.accuracy import verify

        grading, columns = options.get("grading") or {}, options.get("columns") or {}
        try:
            if "grader" not in grading:
                check_arguments(verify, grading, ("gold", "completion"))
            elif not is_import_name(str(grading["grader"])):
                raise ConfigError(f'grader: {grading["grader"]!r} is not "module:function"')
        except ConfigError as error:
            raise ConfigError(f"grading: {error}") from None
        for field, column in columns.items():
            if field not in COLUMNS:
                raise ConfigError(f"columns: no field {field!r}; {nearest(str(field), COLUMNS)}")
            if column is None and field in ("question", "answer"):
                raise ConfigError(f"columns.{field}: cannot be turned off")
            if isinstance(column, tuple | list) and field not in ("images", "choices"):
                raise ConfigError(f"columns.{field}: takes one column, not {len(column)}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        lazy = self._rows[index]
        return self._example(self._prepare(lazy.read()), lazy)

    # What the task of one data set may override.

    candidates: Mapping[str, tuple[str, ...]] = COLUMNS

    def _read_rows(self, path: str) -> Iterator[LazyRow]:
        return read_rows(path, self.split, self.subset)

    def _prepare(self, row: TableRow) -> TableRow:
        return row

    def _kind(self, answer: str) -> Mapping[str, Any]:
        """Grading of a row without choices, by its gold answer."""
        return {}

    def _check_found(self, path: str, seen: Sequence[str]) -> None:
        for field, column in self.columns.items():
            for name in [column] if isinstance(column, str) else column or ():
                if seen and name not in seen:
                    raise ConfigError(f"columns.{field}: {path} has {_no_column(name, seen)}")
        if not self._rows and self.skipped:
            count, first = len(self.skipped), self.skipped[0]
            raise DataError(f"{path}: no usable row; all {count} are bad, the first: {first}")
        if not self._rows:
            chosen = f" with {self.where}" if self.where and seen else ""
            raise DataError(f"{path}: has no rows{chosen}")

    def _wanted(self, row: TableRow, origin: str) -> bool:
        for name, value in self.where.items():
            if name not in row:
                raise DataError(f"{origin}: where.{name}: {_no_column(name, row)}")
            if row[name] not in (value if isinstance(value, tuple | list) else (value,)):
                return False
        return True

    def _example(self, row: TableRow, lazy: LazyRow) -> Example:
        origin, folder, _ = lazy
        sources = self._value(row, "images")
        images = [
            self._image(source, origin, folder)
            for source in (sources if isinstance(sources, list | tuple) else [sources])
            if source not in (None, "")
        ]
        choices = self._choices(row, origin)
        question = self._question(row, origin, bool(images))
        answer = self._answer(row, origin)
        grading = self._kind(answer)
        lettered = list(zip(LETTERS, choices, strict=False))
        if choices:
            answer = _choice_letters(answer, lettered, origin)
            texts = [text or letter for letter, text in lettered]
            grading = {"kind": "choice", "choices": texts}
        lines = [f"({letter}) {text}".rstrip() for letter, text in lettered]
        if not self.show_choices or _has_choices(question, lettered):
            lines = []
        question, images = _place_images(question, lines, images, origin)
        found_id = self._value(row, "id")
        if found_id in (None, ""):
            file, _, number = origin.rpartition(", ")
            found_id = f"{Path(file).stem}-{number.split()[1]}"
        return Example(
            id=str(found_id),
            question=question,
            answer=answer,
            images=tuple(images),
            grading={**grading, **self.grading},
            origin=origin,
            meta={name: row.get(name) for name in self.meta},
            columns={name: value for name, value in row.items() if not sources or value is not sources},
        )

    def _value(self, row: TableRow, field: str, required: str = "") -> Any:
        """The row's value of a field; None if it has none, which raises if `required`."""
        if field in self.columns:
            column = self.columns[field]
            if column is None:
                return None
            if not isinstance(column, str):
                values = [row.get(name) for name in column]
                while values and values[-1] in (None, ""):  # a gap would shift the letters
                    values.pop()
                return values
            if column not in row and required:
                raise DataError(f"{required}: {field}: {_no_column(column, row)}")
            return row.get(column)
        for candidate in self.candidates[field]:
            for name in (candidate, candidate.capitalize(), candidate.upper()):
                if name in row:
                    return row[name]
        if required:
            tried = ", ".join(self.candidates[field])
            raise DataError(
                f"{required}: no {field}: none of {tried} among the columns {listing(row)}; "
                f"name the column by the option columns.{field}"
            )
        return None

    def _question(self, row: TableRow, origin: str, has_images: bool) -> str:
        question = self._value(row, "question", required=origin)
        if question is None and has_images:
            return ""
        if not isinstance(question, str):
            raise DataError(f"{origin}: question: expected text, got {show(question)}")
        if not question.strip() and not has_images:
            raise DataError(f"{origin}: question: empty, and there is no image")
        return question

    def _answer(self, row: TableRow, origin: str) -> str:
        answer = self._value(row, "answer", required=origin)
        if isinstance(answer, list) and answer and all(isinstance(part, str | int | float) for part in answer):
            texts = ", ".join(map(str, answer))  # a box's numbers, or several texts
            answer = texts if isinstance(answer[0], str) or len(answer) == 1 else f"[{texts}]"
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # tables turn a column of integers with a gap into floats
        is_number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
        if not isinstance(answer, str) and not (is_number and math.isfinite(answer)):
            raise DataError(f"{origin}: answer: expected text or a number, got {show(answer)}")
        text = str(answer)
        if self.answer_after:
            _, found, text = text.rpartition(self.answer_after)
            if not found:
                raise DataError(f"{origin}: answer: no {self.answer_after!r} in {show(answer)}")
        if not text.strip():
            raise DataError(f"{origin}: answer: empty")
        return text.strip()

    def _choices(self, row: TableRow, origin: str) -> list[str]:
        """Texts of the choices without their letters; "" where a choice is only its letter."""
        values = self._value(row, "choices")
        if values is None or values == "":
            return []
        is_list = isinstance(values, list | tuple)
        if not is_list or not all(isinstance(value, str | int | float) for value in values):
            raise DataError(f"{origin}: choices: expected a list of texts, got {show(values)}")
        if len(values) == 1 or len(values) > len(LETTERS):
            raise DataError(f"{origin}: choices: {len(values)} of them; 2 to 26 can be graded")
        texts = [str(value).strip() for value in values]
        lettered = zip(LETTERS, texts, strict=False)
        bare = [re.sub(rf"^\(?{letter}(?:[).:]\s*|$)", "", text) for letter, text in lettered]
        labelled = all(a != b for a, b in zip(texts, bare, strict=True))
        return bare if labelled else texts

    def _image(self, source: Any, origin: str, folder: Path) -> ImageSource:
        if isinstance(source, Mapping):  # how the Image feature of `datasets` is stored
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes) and source:
            return source
        if not isinstance(source, str) or not source:
            raise DataError(f"{origin}: image: expected a path or bytes, got {show(source)}")
        try:
            return str(self._find_file(source, self.image_root or folder))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from None


def _place_images(question: str, choice_lines: Sequence[str], images: list[Any], origin: str) -> tuple[str, list[Any]]:
    """Question and images such that the i-th `<image>` marker stands for the i-th image.

    There must be as many bare markers as images. Numbered ones (`<image2>`) may repeat and come in any order: the
    first of each number stays, later ones become the words "(image 2)", and the images are put in the order of their
    markers. A single image stands for all numbered markers, since MathVision draws all figures of a problem into one.
    """
    text = "\n".join([question.rstrip(), *choice_lines] if choice_lines else [question])
    numbers = MARKER.findall(text)
    if not all(numbers):
        if len(numbers) != len(images):
            raise DataError(f"{origin}: {len(numbers)} <image> markers for {len(images)} images")
        return MARKER.sub("<image>", text), images
    order = list(dict.fromkeys(map(int, numbers)))
    if len(images) == 1 and order:
        # A marker among the choices would make the one image look like that choice.
        first = MARKER.search(question)
        start, end, kept = (first.start(), first.end(), "<image>") if first else (0, 0, "")
        return text[:start] + kept + MARKER.sub(r"(image \1)", text[end:]), images
    if order and sorted(order) != list(range(1, len(images) + 1)):
        raise DataError(f"{origin}: markers for images {', '.join(map(str, sorted(order)))}, but {len(images)} images")
    left = set(order)

    def place(found: re.Match[str]) -> str:
        number = int(found[1])
        if number not in left:
            return f"(image {number})"
        left.remove(number)
        return "<image>"

    return MARKER.sub(place, text), [images[n - 1] for n in order] if order else images


def _choice_letters(answer: str, choices: Sequence[tuple[str, str]], origin: str) -> str:
    """The gold answer as a letter (several as "C, D"), given as letters or as a choice's text."""
    letters = [letter for letter, _ in choices]
    words = re.split(r"[\s,;]+|\band\b", answer)
    parts = [part for word in words if (part := word.strip("().: "))]
    if parts and set(parts) <= set(letters):
        return ", ".join(parts)
    same = [letter for letter, text in choices if text == answer]
    if len(same) != 1:
        raise DataError(
            f"{origin}: answer: {show(answer)} is neither a letter up to {letters[-1]} nor the "
            "text of one choice; for a free answer set columns: {choices: null}"
        )
    return same[0]


def _has_choices(question: str, choices: Sequence[tuple[str, str]]) -> bool:
    return all(re.search(rf"\b{letter}[).:]\s*{re.escape(text)}", question) for letter, text in choices)


def _no_column(name: object, columns: Any) -> str:
    return f"no column {name!r}; the columns are {listing(columns)}"
