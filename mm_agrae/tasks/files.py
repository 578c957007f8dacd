"""Tables of questions and answers: files, folders, Hugging Face data sets.

    - task: files
      path: data/downloads/geometry3k/train.jsonl
      columns: {answer: answer_value, choices: null}

Accepted are JSONL, JSON (a list of objects), CSV, TSV and Parquet files, a folder of such files, a
folder written by `datasets.save_to_disk`, and the id of a data set on the Hugging Face hub. Rows of
TRL, verl, EasyR1, ms-swift and LLaVA are recognised by their columns, chat messages among them
(`chat.py`), and choices in most shapes (`choices.py`). Every row is checked when the task is made. Of
images only the existence is checked; they are decoded when the row is processed. Messages count lines
of JSONL and CSV from 1 and rows of other formats from 0.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mm_agrae.config.plugins import check_arguments, is_import_name
from mm_agrae.errors import ConfigError, DataError, nearest
from mm_agrae.tasks.chat import Chat, messages_in, read_chat
from mm_agrae.tasks.choices import LETTERS, gold_letters, read_choices
from mm_agrae.tasks.images import decode_source, find_file
from mm_agrae.tasks.rows import MISSING, LazyRow, TableRow, listing, literal, lookup, read_rows, show
from mm_agrae.types import Example, ImageSource

COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("problem", "question", "prompt", "messages", "conversations", "conversation", "query"),
    "answer": ("answer", "solution", "target", "answerKey", "ground_truth"),
    "images": ("images", "image"),
    "choices": ("choices", "options"),
    "id": ("id", "unique_id"),
    "system": (),
    "videos": ("videos", "video", "audios", "audio"),
}
"""Fields of an example, and the columns each is looked for in (also as Problem and PROBLEM)."""
VERL = {"question": "prompt", "answer": "reward_model.ground_truth"}
"""Where rows with a column reward_model have these fields."""
LIKE_SYSTEM = re.compile(r"sys(tem)?([_ ]?(prompt|message|text|turn))?", re.IGNORECASE)

TAGGED = re.compile(r"<answer>(?!.*<answer>)\s*(.*?)\s*</answer>", re.DOTALL)
MARKER = re.compile(r"<image ?([0-9]{0,3})>")

ColumnName = str | Sequence[str] | None


class FileTask:
    """Examples from the rows of files.

    `path`: a file, a folder or a hub id; `split` and `subset` choose among the files of a folder
    or the parts of a hub data set.
    `columns`: which column each of question, answer, images, choices, id and system is read from, for
    instance `{question: query, answer: reward_model.ground_truth}` (a dot goes into a column); null turns
    a field off. `images` and `choices` also take a list of columns, for tables with one column per
    image or choice. A column is a system turn only if named here; a system turn among chat messages always
    is, unless `system: null`. Rows with `videos` are refused; null reads them without.
    `where`: keep only rows with these values, such as `{answer_type: closed, level: [4, 5]}`.
    `grading`: arguments of `grading.accuracy.verify` for every row. Rows with choices are graded
    as `{"kind": "choice", "choices": [...]}`, which these override. With
    `grader: "module:function"` that function grades instead (see `rewards.parts.accuracy`) and
    receives the other keys as they are.
    `show_choices`: append the choices to the question as lines "(A) …", unless it has them.
    `answer_after`: the answer is what follows the last occurrence of this text, such as "####"
    for GSM8K.
    `choice_index`: gold answers of rows with choices are positions, counted from 0 or 1.
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
        choice_index: Literal[0, 1] | None = None,
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
        self.show_choices, self.answer_after, self.choice_index = show_choices, answer_after, choice_index
        self.image_root, self.meta = image_root, tuple(meta)
        self.skipped: list[str] = []
        self.notes: list[str] = []
        """What the rows are read as, and what about them may be meant otherwise; a line each."""
        self._rows: list[LazyRow] = []
        self._found: dict[tuple[str, ...], dict[str, ColumnName]] = {}
        self._like_positions = 0
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
                    if not self.notes:
                        self._note(path or lazy.origin, row)
            except DataError as error:
                if on_bad_row == "error":
                    raise DataError(f"{error}; fix it or set data.on_bad_row=skip") from None
                self.skipped.append(str(error))
        self._check_found(path, list(seen))
        if self._like_positions:
            self.notes.append(
                f"{self._like_positions:,} gold answers are read as texts of choices and could be positions; if so, "
                "set choice_index: 0, or 1 to count from 1"
            )

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

    def _note(self, path: str, row: TableRow) -> None:
        """Say what the rows are read as, by one of them."""
        used = {field: column for field, column in self._columns_of(row).items() if column and field != "videos"}
        chat = messages_in(self._value(row, "question"))
        shown = [f"{field} from {', '.join(_names_in(column))}" for field, column in used.items()]
        if chat and "answer" not in used:
            shown.append("answer from the assistant's turn")
        named = {name for column in used.values() for each in _names_in(column) for name in (each, _outer(each))}
        unused = [name for name in row if name not in named]
        rest = f"; not used: {listing(unused)}" if unused else ""
        self.notes.append(f"{path}: read as {_kind_of_rows(row, used, chat)} ({', '.join(shown)}{rest})")
        for name, value in row.items() if "system" not in self.columns else ():
            if LIKE_SYSTEM.fullmatch(name) and isinstance(value, str) and value.strip():
                self.notes.append(
                    f"{path}: the column {name} looks like a system turn and is not used; columns: {{system: {name}}} "
                    "puts it in front of each question, columns: {system: null} leaves it out"
                )

    def _check_found(self, path: str, seen: Sequence[str]) -> None:
        for field, column in self.columns.items():
            for name in _names_in(column):
                if seen and name not in seen and _outer(name) not in seen:
                    raise ConfigError(f"columns.{field}: {path} has {_no_column(name, seen)}")
        if not self._rows and self.skipped:
            count, first = len(self.skipped), self.skipped[0]
            raise DataError(f"{path}: no usable row; all {count} are bad, the first: {first}")
        if not self._rows:
            chosen = f" with {self.where}" if self.where and seen else ""
            raise DataError(f"{path}: has no rows{chosen}")

    def _wanted(self, row: TableRow, origin: str) -> bool:
        for name, value in self.where.items():
            if (found := lookup(row, name)) is MISSING:
                raise DataError(f"{origin}: where.{name}: {_no_column(name, row)}")
            if found not in (value if isinstance(value, tuple | list) else (value,)):
                return False
        return True

    def _example(self, row: TableRow, lazy: LazyRow) -> Example:
        origin, folder, _ = lazy
        chat = self._chat(row, origin)
        images = [self._image(source, origin, folder) for source in self._sources(row, chat, origin)]
        choices, labels = self._choices(row, origin)
        question = self._question(chat, origin, bool(images))
        answer = self._answer(row, chat, origin, bool(choices))
        grading = self._kind(answer)
        lettered = list(zip(LETTERS, choices, strict=False))
        if choices:
            answer = self._gold_choice(answer, labels, choices, origin)
            texts = [text or letter for letter, text in lettered]
            grading = {"kind": "choice", "choices": texts}
        lines = [f"({letter}) {text}".rstrip() for letter, text in lettered]
        if not self.show_choices or _has_choices(question, lettered):
            lines = []
        before = sum(text.count("<image>") for _, text in chat.history)  # whose images come first
        question, own = _place_images(question, lines, images[before:], origin)
        found_id = self._value(row, "id")
        if found_id in (None, ""):
            file, _, number = origin.rpartition(", ")
            found_id = f"{Path(file).stem}-{number.split()[1]}"
        return Example(
            id=str(found_id),
            question=question,
            answer=answer,
            images=(*images[:before], *own),
            grading={**grading, **self.grading},
            origin=origin,
            meta={name: lookup(row, name, None) for name in self.meta},
            columns={name: row[name] for name in row if name not in _names_in(self._columns_of(row)["images"])},
            system=chat.system,
            history=chat.history,
        )

    def _columns_of(self, row: TableRow) -> dict[str, ColumnName]:
        """The column of each field in rows with these names, looked for once for each set of names."""
        names = tuple(row)
        if names not in self._found:
            self._found[names] = {field: self._column_of(field, names) for field in self.candidates}
        return self._found[names]

    def _column_of(self, field: str, names: Sequence[str]) -> ColumnName:
        if field in self.columns:
            return self.columns[field]
        if "reward_model" in names and _outer(VERL.get(field, "")) in names:
            return VERL[field]
        for candidate in self.candidates[field]:
            for name in (candidate, candidate.capitalize(), candidate.upper()):
                if name in names:
                    return name
        if field == "images" and (numbered := [name for name in names if re.fullmatch(r"image_?[0-9]+", name)]):
            return sorted(numbered, key=lambda name: int(name.strip("image_")))
        if field == "choices" and {"A", "B"} <= {*names}:
            return [letter for letter in LETTERS if {*LETTERS[: LETTERS.index(letter) + 1]} <= {*names}]
        return None

    def _value(self, row: TableRow, field: str, required: str = "") -> Any:
        """The row's value of a field; None if it has none, which raises if `required`."""
        column = self._columns_of(row)[field]
        if isinstance(column, str):
            value = lookup(row, column, MISSING if required else None)
            if value is MISSING:
                raise DataError(f"{required}: {field}: {_no_column(column, row)}")
            return value
        if column is not None:
            values = [None if (value := row.get(name)) != value else value for name in column]  # NaN in tables
            while values and values[-1] in (None, ""):  # a gap would shift the letters
                values.pop()
            return values
        if required:
            tried = ", ".join(self.candidates[field])
            raise DataError(
                f"{required}: no {field}: none of {tried} among the columns {listing(row)}; "
                f"name the column by the option columns.{field}"
            )
        return None

    def _chat(self, row: TableRow, origin: str) -> Chat:
        """What is asked, with the row's own system turn. Raises DataError for videos and sound, too."""
        value = self._value(row, "question", required=origin)
        messages = messages_in(value)
        chat = read_chat(messages, origin) if messages else Chat(value)
        text = " ".join([str(chat.question), *(text for _, text in chat.history)])
        videos = self._value(row, "videos")
        found = (any(videos) if isinstance(videos, list) else videos) or "<video>" in text or "<audio>" in text
        if found and self.columns.get("videos", "") is not None:
            raise DataError(
                f"{origin}: has a video or sound, which cannot be shown to the model; list frames of it as images "
                "instead, or read the rows without it by columns: {videos: null}"
            )
        if "system" in self.columns:
            named = self._value(row, "system")
            if named is not None and not isinstance(named, str):
                raise DataError(f"{origin}: system: expected text, got {show(named)}")
            chat = chat._replace(system=named or "")
        return chat

    def _question(self, chat: Chat, origin: str, has_images: bool) -> str:
        question = chat.question
        if question is None and has_images:
            return ""
        if not isinstance(question, str):
            raise DataError(f"{origin}: question: expected text, got {show(question)}")
        if not question.strip() and not has_images:
            raise DataError(f"{origin}: question: empty, and there is no image")
        return question

    def _answer(self, row: TableRow, chat: Chat, origin: str, chooses: bool) -> str:
        answer = self._value(row, "answer", required="" if chat.reply else origin)
        if answer is None and chat.reply:
            answer = chat.reply
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # tables turn a column of integers with a gap into floats
        if chooses and isinstance(answer, str) and isinstance(letters := literal(answer), list):
            answer = letters
        if isinstance(answer, list | Mapping):
            answer = self._listed_answer(answer, chooses)
        is_number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
        if not isinstance(answer, str) and not (is_number and math.isfinite(answer)):
            raise DataError(f"{origin}: answer: expected text or a number, got {show(answer)}")
        text = str(answer)
        if self.answer_after:
            _, found, text = text.rpartition(self.answer_after)
            if not found:
                raise DataError(f"{origin}: answer: no {self.answer_after!r} in {show(answer)}")
        if "</answer>" in text and (tagged := TAGGED.search(text)):
            text = tagged[1]
        if not text.strip():
            raise DataError(f"{origin}: answer: empty")
        return text.strip()

    def _listed_answer(self, answer: Any, chooses: bool) -> Any:
        """Text for a list of numbers or texts, or what one's own grader will read; else as it was."""
        if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str | int | float):
            return answer[0]
        texts = isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer)
        if texts and (chooses or "grader" not in self.grading):
            return ", ".join(answer)
        try:
            text = json.dumps(answer, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            return answer
        numbers = isinstance(answer, list) and answer and re.fullmatch(r"[-+0-9.eE, \[\]]+", text)
        return text if numbers or "grader" in self.grading else answer

    def _choices(self, row: TableRow, origin: str) -> tuple[list[str], list[str]]:
        values = self._value(row, "choices")
        return ([], []) if values in (None, "", [], {}, "[]", "{}") else read_choices(values, origin)

    def _gold_choice(self, answer: str, labels: Sequence[str], texts: Sequence[str], origin: str) -> str:
        position = int(answer) if answer.isdecimal() and len(answer) < 3 else -1
        if self.choice_index is None:
            letters = gold_letters(answer, texts, labels, origin)
            if not labels and LETTERS.find(letters) != position and 0 <= position < len(texts):
                self._like_positions += 1
            return letters
        first = self.choice_index
        if not first <= position < first + len(texts):
            raise DataError(
                f"{origin}: answer: {show(answer)} is no position from {first} to {first + len(texts) - 1} "
                f"(choice_index: {first})"
            )
        return LETTERS[position - first]

    def _sources(self, row: TableRow, chat: Chat, origin: str) -> list[Any]:
        """The row's images in order: those within messages, and the columns' at markers without their own."""
        sources = self._value(row, "images")
        if isinstance(sources, str) and isinstance(spelt := literal(sources), list):
            sources = spelt
        listed = sources if isinstance(sources, list | tuple) else [sources]
        listed = [source for source in listed if source not in (None, "")]
        if all(source is None for source in chat.images):
            return listed
        rest = iter(listed)
        placed = [next(rest, None) if source is None else source for source in chat.images]
        again = None not in chat.images and len(listed) == len(placed)  # the column lists the same ones
        if None in placed or (list(rest) and not again):
            raise DataError(f"{origin}: {len(placed)} images in the messages do not fit {len(listed)} in their column")
        return placed

    def _image(self, source: Any, origin: str, folder: Path) -> ImageSource:
        try:
            decoded = decode_source(source)
            return decoded if isinstance(decoded, bytes) else str(self._find_file(decoded, self.image_root or folder))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from None


def _names_in(column: ColumnName) -> Sequence[str]:
    return [column] if isinstance(column, str) else column or ()


def _outer(name: str) -> str:
    return name.partition(".")[0]


def _kind_of_rows(row: TableRow, used: Mapping[str, ColumnName], chat: Sequence[Any] | None) -> str:
    if "reward_model" in row:
        return "verl rows"
    if not chat:
        return "EasyR1 rows" if {"problem", "answer", "images"} <= row.keys() else "plain rows"
    if "from" in chat[0]:
        return "LLaVA conversations"
    if used.get("question") == "messages":
        return "ms-swift rows" if "solution" in row else "chat messages"
    return "TRL rows" if used.get("question") == "prompt" else "chat messages"


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


def _has_choices(question: str, choices: Sequence[tuple[str, str]]) -> bool:
    return all(re.search(rf"\b{letter}[).:]\s*{re.escape(text)}", question) for letter, text in choices)


def _no_column(name: object, columns: Any) -> str:
    return f"no column {name!r}; the columns are {listing(columns)}"
