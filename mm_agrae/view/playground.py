"""Several checkpoints answer one question, token by token, and can be stopped at any token.

    models = Models({"base": "data/warm_start/vl"})
    for columns in Run(models, ["base"], Ask("How many?", picture)).stream():
        ...  # one Column a checkpoint, its traces so far

The sampling is the rollout's own (`HFEngine`); what is seen here is what training would see.
Each checkpoint writes in a thread of its own, so that answers grow side by side. Probability and
entropy of a token are the model's at temperature 1, whatever temperature it was drawn at.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mm_agrae import config as configs
from mm_agrae.config import ModelSection, PromptSection, SamplingSection
from mm_agrae.errors import DataError, ModelError, UserError
from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.extraction import extract_answer
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout import derive_seed
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.run import checkpoint
from mm_agrae.tasks.images import open_image
from mm_agrae.types import Example
from mm_agrae.view.page import percent

MAX_CHECKPOINTS = 3
MAX_SAMPLES = 16
MAX_NEW_TOKENS = 1024
MAX_QUESTION = 20_000  # characters
ALTERNATIVES = 3
TICK_S = 0.15
"""How often a stream says what is new: often enough to read along, rarely enough for a phone."""


# -- what is asked and what comes back


@dataclass(frozen=True)
class Ask:
    """A question and how to answer it.

    `described` stands in for question and picture before a model that reads text alone.
    `grading` is as in `Example`; without an `answer` nothing is graded. `seed` decides the
    samples; every checkpoint gets the same one.
    """

    question: str
    picture: Image.Image | None = None
    answer: str = ""
    described: str = ""
    grading: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def check(self) -> None:
        """Raise DataError for what cannot be asked."""
        if not self.question.strip():
            raise DataError("Type a question first, or draw a problem.")
        if len(self.question) > MAX_QUESTION:
            raise DataError(
                f"The question has {len(self.question):,} characters; at most {MAX_QUESTION:,}."
            )
        for name, value, low, high in (
            ("The number of samples", self.samples, 1, MAX_SAMPLES),
            ("The temperature", self.temperature, 0, 2),
            ("The length", self.max_new_tokens, 1, MAX_NEW_TOKENS),
        ):
            if not low <= value <= high:
                raise DataError(f"{name} is {value:g}; it must be {low:g} to {high:g}.")


@dataclass(frozen=True)
class Token:
    """A token as text, its probability, the entropy (nats) there, and the likeliest tokens."""

    text: str
    probability: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Trace:
    """One answer, so far or whole.

    `state` is "writing", "stop", "length" (the limit of tokens) or "stopped" (by the user).
    `thought` is the reasoning, `answer` what follows it, `final` the final answer in that, None
    if it has none. `success` is None without a gold answer and while writing. `tokens` is filled
    once the trace has ended.
    """

    text: str
    count: int
    state: str
    thought: str
    answer: str
    final: str | None = None
    success: bool | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Column:
    """What one checkpoint did. `state`: waiting, loading, writing, done, stopped or failed."""

    label: str
    state: str = "waiting"
    message: str = ""
    asked: str = ""
    traces: tuple[Trace, ...] = ()
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(trace.count for trace in self.traces)


@dataclass(frozen=True)
class Share:
    """How many of the samples give one final answer; None stands for no answer."""

    answer: str | None
    count: int
    share: float
    success: bool | None


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(reasoning, what follows it). `opened`: the prompt ended inside the reasoning.

    A reasoning that is not closed is all there is; text without any tag is all answer.
    """
    before, mark, after = text.rpartition("</think>")
    if not mark:
        head, opening, rest = text.partition("<think>")
        if opening:
            return f"{head}{rest}".strip(), ""
        return (text.strip(), "") if opened else ("", text.strip())
    return before.replace("<think>", "", 1).strip(), after.strip()


def agreement(traces: Sequence[Trace], grading: Mapping[str, Any]) -> list[Share]:
    """The share of each distinct final answer among traces that ended, most frequent first.

    Two answers are one if the verifier takes one for the other.
    """
    ended = [trace for trace in traces if trace.state in ("stop", "length")]
    groups: list[list[Trace]] = []
    for trace in ended:
        for group in groups:
            if _agree(group[0].final, trace.final, grading):
                group.append(trace)
                break
        else:
            groups.append([trace])
    groups.sort(key=len, reverse=True)
    return [
        Share(group[0].final, len(group), len(group) / len(ended), group[0].success)
        for group in groups
    ]


def _agree(one: str | None, other: str | None, grading: Mapping[str, Any]) -> bool:
    if one is None or other is None or one == other:
        return one == other
    return verify(one, f"\\boxed{{{other}}}", **grading)


def in_words(columns: Sequence[Column]) -> str:
    """One line on how far a run is."""
    parts = []
    for column in columns:
        done = sum(trace.state != "writing" for trace in column.traces)
        said = column.state
        if column.traces:
            said = f"{done} of {len(column.traces)} written, {column.tokens:,} tokens"
        if column.seconds > 0 and column.tokens:
            said += f", {column.tokens / column.seconds:.0f} tokens/s"
        if column.state in ("stopped", "failed"):
            said = column.state
        parts.append(f"{column.label}: {said}")
    return " · ".join(parts)


def right(traces: Sequence[Trace]) -> str:
    """How many of the graded traces are right, in words; empty if none is graded."""
    graded = [trace.success for trace in traces if trace.success is not None]
    if not graded:
        return ""
    return f"{sum(graded)} of {len(graded)} right ({percent(sum(graded) / len(graded))})"


def read_picture(path: str, max_pixels: int) -> Image.Image:
    """The uploaded picture. Raises DataError in words for who uploaded it, without the path."""
    data = Path(path).read_bytes()
    return open_image(data, origin="The picture", max_pixels=max_pixels)


# -- checkpoints, shared by all users


@dataclass
class Loaded:
    """A checkpoint in memory. `lock` is held while it writes."""

    processing: Processing
    engine: HFEngine
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def context(self) -> int:
        config = self.engine.policy.hf.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 30)


class Models:
    """Checkpoints by name, loaded on first use, the `keep` latest kept. Safe between threads.

    With `allow_paths`, names that are not known count as checkpoint folders or model ids.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        *,
        device: str = "auto",
        allow_paths: bool = False,
        keep: int = 4,
    ) -> None:
        self.paths = dict(paths)
        self.allow_paths = allow_paths
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if cuda else "cpu"
        self._keep = keep
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._guard = threading.Lock()
        self._loading = threading.Lock()  # transformers is not made to load twice at a time

    def path(self, name: str) -> str:
        """Raises ModelError for a name that may not be used."""
        if name in self.paths:
            return self.paths[name]
        if not self.allow_paths:
            known = ", ".join(self.paths) or "none"
            raise ModelError(
                f"There is no checkpoint {name!r} here (there are: {known}). Paths are taken only "
                "if the demo was started with --allow-model-paths."
            )
        return name

    def reads_pictures(self, name: str) -> bool:
        """Whether the checkpoint is a vision-language one; read from its config alone."""
        path = self.path(name)
        with self._guard:
            if name in self._loaded:
                return self._loaded[name].processing.is_multimodal
        return _has_vision(path, self._loading)

    def get(self, name: str) -> Loaded:
        """The checkpoint, loaded once for everybody. Raises ModelError."""
        path = self.path(name)
        with self._loading:
            with self._guard:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
                    return self._loaded[name]
            loaded = self._load(path)
            with self._guard:
                self._loaded[name] = loaded
                while len(self._loaded) > self._keep:
                    self._loaded.popitem(last=False)
            return loaded

    def _load(self, path: str) -> Loaded:
        settings = _prompt_settings(path)
        processing = Processing(path, settings)
        policy = Policy(ModelSection(path=path), processing, device=self.device)
        return Loaded(processing, HFEngine(policy.eval(), processing))


@lru_cache(maxsize=256)
def _has_vision(path: str, loading: threading.Lock) -> bool:
    """What is wrong with a checkpoint is told when it is loaded, not here."""
    with contextlib.suppress(UserError, OSError, ValueError):
        path = model_and_adapter(path)[0]
        file = Path(path) / "config.json"
        if file.is_file():
            return "vision_config" in json.loads(file.read_text(encoding="utf-8"))
        with loading:
            from transformers import AutoConfig

            return hasattr(AutoConfig.from_pretrained(path), "vision_config")
    return True


def _prompt_settings(path: str) -> PromptSection:
    """As the checkpoint was trained, if it says so. Its length is checked against the model."""
    own = Path(path) / checkpoint.CONFIG_FILE
    settings = configs.load(str(own), []).prompt if own.is_file() else PromptSection()
    return settings.model_copy(update={"max_tokens": 1 << 30})


# -- one question


class Stopped(Exception):
    """Raised inside the sampling loop when the user stops it."""


class Run:
    """One question to one to three checkpoints. `cancel` may be called from any thread."""

    def __init__(
        self, models: Models, names: Sequence[str], ask: Ask, stop: threading.Event | None = None
    ) -> None:
        """`stop` ends the run when it is set, or before it has begun.

        Raises DataError for what cannot be asked, ModelError for unknown checkpoints.
        """
        if not 1 <= len(names) <= MAX_CHECKPOINTS:
            raise DataError(
                f"Choose one to {MAX_CHECKPOINTS} checkpoints; {len(names)} are chosen."
            )
        ask.check()
        for name in names:
            models.path(name)
        self.ask = ask
        self._stop = stop or threading.Event()
        self._writers = [_Writer(models, name, ask, self._stop) for name in names]

    def cancel(self) -> None:
        self._stop.set()

    def stream(self) -> Iterator[tuple[Column, ...]]:
        """Snapshots, the last one final. Closing the iterator stops the sampling.

        Returns only after the sampling has ended, be it by itself or by `cancel`.
        """
        threads = [
            threading.Thread(target=writer.run, name=f"playground {writer.name}", daemon=True)
            for writer in self._writers
        ]
        for thread in threads:
            thread.start()
        shown: tuple[Column, ...] = ()
        try:
            while any(thread.is_alive() for thread in threads):
                self._wait()
                columns = tuple(writer.column() for writer in self._writers)
                if columns != shown:
                    shown = columns
                    yield columns
            for writer in self._writers:
                if writer.error is not None:
                    raise writer.error
            columns = tuple(writer.column() for writer in self._writers)
            if columns != shown:
                yield columns
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _wait(self) -> None:
        """Sleep for a tick, or until all is written."""
        end = time.monotonic() + TICK_S
        for writer in self._writers:
            with contextlib.suppress(queue.Empty):
                writer.ended.get(timeout=max(0.0, end - time.monotonic()))
                writer.ended.put(None)


class _Row:
    """One completion while it is written."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.numbers: list[tuple[float, float, list[int], list[float]]] = []
        self.state = "writing"
        self.trace: Trace | None = None


class _Writer:
    """A checkpoint at work in its thread; `column` is called from another one."""

    def __init__(self, models: Models, name: str, ask: Ask, stop: threading.Event) -> None:
        self.name = name
        self.ended: queue.Queue[None] = queue.Queue()
        self.error: Exception | None = None
        self._models, self._ask, self._stop = models, ask, stop
        self._loaded: Loaded | None = None
        self._eos: frozenset[int] = frozenset()
        self._rows: list[_Row] = []
        self._state, self._message, self._asked = "waiting", "", ""
        self._started, self._seconds = 0.0, 0.0

    def run(self) -> None:
        try:
            self._write()
            self._state = "done"
        except Stopped:
            self._state = "stopped"
        except UserError as error:
            self._state, self._message = "failed", str(error)
        except (MemoryError, torch.OutOfMemoryError):
            self._state = "failed"
            self._message = "Out of memory; take fewer samples, a smaller picture or fewer tokens."
        except Exception as error:
            self._state, self.error = "failed", error
        finally:
            for row in self._rows:
                if row.state == "writing":
                    row.state = "stopped"
            self.ended.put(None)

    def column(self) -> Column:
        state, rows = self._state, self._rows
        if self._started and state == "writing":
            self._seconds = time.monotonic() - self._started
        traces = tuple(self._trace(row) for row in rows)
        seconds = round(self._seconds, 1)
        return Column(self.name, state, self._message, self._asked, traces, seconds)

    def _write(self) -> None:
        self._state = "loading"
        self._check()
        self._loaded = loaded = self._models.get(self.name)
        self._eos = frozenset(loaded.processing.eos_ids)
        while not loaded.lock.acquire(timeout=0.1):
            self._check()
        try:
            self._check()
            ask = self._ask
            prompt = loaded.processing.prompt(self._example(loaded.processing.is_multimodal))
            room = loaded.context - ask.max_new_tokens
            if len(prompt) > room:
                raise DataError(
                    f"Question and picture are {len(prompt):,} tokens, but {self.name} has room "
                    f"for {max(room, 0):,} beside an answer of {ask.max_new_tokens:,}. Shorten the "
                    "question, use a smaller picture, or allow fewer tokens for the answer."
                )
            count = 1 if ask.temperature == 0 else ask.samples
            self._rows = [_Row() for _ in range(count)]
            self._started, self._state = time.monotonic(), "writing"
            sampling = SamplingSection(
                temperature=ask.temperature, max_new_tokens=ask.max_new_tokens
            )
            seed = derive_seed("playground", ask.seed)
            loaded.engine.generate([prompt], count, sampling, [seed], on_tokens=self._watch)
            for row in self._rows:
                if row.state == "writing":
                    row.state = "length"
        finally:
            loaded.lock.release()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _example(self, reads_pictures: bool) -> Example:
        ask = self._ask
        if reads_pictures:
            self._asked = ask.question
            images = () if ask.picture is None else (ask.picture,)
        else:
            self._asked, images = ask.described or ask.question, ()
        return Example("question", self._asked, ask.answer, images, origin="Your question")

    def _watch(self, row_B: torch.Tensor, token_B: torch.Tensor, logits_BV: torch.Tensor) -> None:
        self._check()
        logp_BV = logits_BV.log_softmax(-1)
        probability_BV = logp_BV.exp()
        entropy_B = -(probability_BV * logp_BV).sum(-1)
        drawn_B = probability_BV.gather(-1, token_B[:, None])[:, 0]
        top_BA, top_id_BA = probability_BV.topk(min(ALTERNATIVES, probability_BV.shape[-1]))
        columns = (row_B, token_B, drawn_B, entropy_B, top_id_BA, top_BA)
        for row, token, *numbers in zip(*(column.tolist() for column in columns), strict=True):
            written = self._rows[row]
            written.numbers.append(tuple(numbers))
            written.ids.append(token)
            if token in self._eos:
                written.state = "stop"

    def _trace(self, row: _Row) -> Trace:
        """Ended traces are made once: grading and the tokens' texts take time."""
        if row.trace is not None or self._loaded is None:
            return row.trace or Trace("", 0, row.state, "", "")
        state, ids = row.state, list(row.ids)
        processing = self._loaded.processing
        text = processing.decode(ids)
        if state == "writing":
            text = text.rstrip(
                "\N{REPLACEMENT CHARACTER}"
            )  # a letter whose bytes are still to come
        thought, answer = split_thinking(text, processing.opens_thinking)
        trace = Trace(text, len(ids), state, thought, answer)
        if state == "writing":
            return trace
        if state != "stopped":
            final = extract_answer(text)
            success = None
            if self._ask.answer.strip():
                success = verify(self._ask.answer, text, **self._ask.grading)
            trace = replace(trace, final=final, success=success)
        row.trace = replace(trace, tokens=self._tokens(row))
        return row.trace

    def _tokens(self, row: _Row) -> tuple[Token, ...]:
        assert self._loaded is not None
        decode = lru_cache(maxsize=None)(self._loaded.processing.tokenizer.decode)
        return tuple(
            Token(
                decode(token),
                probability,
                max(0.0, entropy),
                tuple((decode(i), p) for i, p in zip(top_ids, top, strict=True)),
            )
            for token, (probability, entropy, top_ids, top) in zip(
                row.ids, row.numbers, strict=False
            )
        )
