"""Several checkpoints answer one question, token by token, and can be stopped at any token.

    checkpoints = CheckpointCache({"base": "data/warm_start/vl"})
    for shown in SideBySide(checkpoints, ["base"], Question("How many?", image)).stream():
        ...  # one CheckpointTraces per checkpoint, as far as they have been generated

The sampling is the rollout's own (`HFEngine`), so completions are what training would see. Each
checkpoint generates in its own thread, so completions grow side by side. A token's probability
and entropy are the model's at temperature 1, whatever the sampling temperature.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mm_agrae.config import SamplingSection
from mm_agrae.errors import DataError, UserError
from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.extraction import extract_answer
from mm_agrae.rollout import derive_seed
from mm_agrae.tasks.images import open_image
from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.types import Example
from mm_agrae.view.playground_checkpoints import CheckpointCache, LoadedCheckpoint

MAX_CHECKPOINTS = 3
MAX_SAMPLES = 16
MAX_NEW_TOKENS = 1024
MAX_QUESTION = 20_000  # characters
ALTERNATIVES = 3
TICK_S = 0.15
"""Time between updates: short enough to read along, long enough for a phone to keep up."""


@dataclass(frozen=True)
class Question:
    """A question and how to sample answers to it.

    `described` replaces question and image for checkpoints that read text only. `grading` is as
    in `Example`; without a gold `answer` nothing is graded. All checkpoints share the `seed`.
    """

    text: str
    image: Image.Image | None = None
    answer: str = ""
    described: str = ""
    grading: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def check(self) -> None:
        """Raise DataError if a value is missing or out of range."""
        if not self.text.strip():
            raise DataError("Type a question first, or choose another problem.")
        if len(self.text) > MAX_QUESTION:
            raise DataError(f"The question has {len(self.text):,} characters; at most {MAX_QUESTION:,}.")
        for name, value, low, high in (
            ("The number of samples", self.samples, 1, MAX_SAMPLES),
            ("The temperature", self.temperature, 0, 2),
            ("The length", self.max_new_tokens, 1, MAX_NEW_TOKENS),
        ):
            if not low <= value <= high:
                raise DataError(f"{name} is {value:g}; it must be {low:g} to {high:g}.")


@dataclass(frozen=True)
class Problem:
    """A problem of the synthetic test split, as filled into the playground's form."""

    text: str
    answer: str
    image: Image.Image | None
    described: str
    grading: Mapping[str, Any]

    @classmethod
    def sample(cls, level: int | None, with_image: bool, index: int | None = None) -> Problem:
        """One of `level` (None: any), at random unless `index` is given."""
        levels = None if level is None else [level]
        shown, told = (SyntheticTask("test", modality, levels=levels) for modality in ("image", "text"))
        index = random.randrange(len(shown)) if index is None else index
        example, described = shown[index], told[index].question
        image = example.images[0]
        assert isinstance(image, Image.Image)  # synthetic images are drawn, not read
        return cls(
            example.question if with_image else described,
            example.answer,
            image if with_image else None,
            described,
            dict(example.grading),
        )

    def question(self, text: str, answer: str, image: Image.Image | None, **sampling: Any) -> Question:
        """What the form asks now: an edited text or answer is no longer this problem's."""
        same = text == self.text
        return Question(
            text,
            image,
            answer,
            described=self.described if same else "",
            grading=self.grading if same and answer == self.answer else {},
            **sampling,
        )


@dataclass(frozen=True)
class Token:
    """A token's text, its probability, the entropy (nats) there, and the most likely tokens."""

    text: str
    probability: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Trace:
    """One completion, as far as it has been generated.

    `state` is "writing", "stop", "length" (the token limit) or "stopped" (by the user). `thought` is the reasoning,
    `answer` what follows it, `final` the answer extracted from that, None if there is none. `success` is None without
    a gold answer and while writing. `tokens` is empty until the trace has ended.
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
class CheckpointTraces:
    """The traces of one checkpoint. `asked` is the question it was given, in words if need be.

    `state` is "waiting", "loading", "writing", "done", "stopped" or "failed"; `message` says why it failed.
    """

    label: str
    state: str = "waiting"
    message: str = ""
    asked: str = ""
    traces: tuple[Trace, ...] = ()
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(trace.count for trace in self.traces)


def read_image(path: str, max_pixels: int) -> Image.Image:
    """The uploaded image. Raises DataError with a message for the uploader, without the path."""
    return open_image(Path(path).read_bytes(), origin="The image", max_pixels=max_pixels)


class Stopped(Exception):
    """Raised inside the sampling loop when the user stops it."""


class SideBySide:
    """One question to one to three checkpoints."""

    def __init__(
        self,
        checkpoints: CheckpointCache,
        names: Sequence[str],
        question: Question,
        stop: threading.Event | None = None,
    ) -> None:
        """Setting `stop`, from any thread, ends the sampling, also before it has begun.

        Raises DataError for an invalid question, ModelError for unknown checkpoints.
        """
        if not 1 <= len(names) <= MAX_CHECKPOINTS:
            raise DataError(f"Choose one to {MAX_CHECKPOINTS} checkpoints; {len(names)} are chosen.")
        question.check()
        for name in names:
            checkpoints.path(name)
        self._stop = stop or threading.Event()
        self._writers = [_Writer(checkpoints, name, question, self._stop) for name in names]

    def stream(self) -> Iterator[tuple[CheckpointTraces, ...]]:
        """Snapshots, the last one final. Closing the iterator stops the sampling.

        Returns only once the sampling has ended, either by itself or by `stop`.
        """
        threads = [
            threading.Thread(target=writer.run, name=f"playground {writer.name}", daemon=True)
            for writer in self._writers
        ]
        for thread in threads:
            thread.start()
        last: tuple[CheckpointTraces, ...] = ()
        try:
            writing = True
            while writing:
                end = time.monotonic() + TICK_S
                for thread in threads:
                    thread.join(timeout=max(0.0, end - time.monotonic()))
                writing = any(thread.is_alive() for thread in threads)
                for writer in self._writers:
                    if writer.error is not None and not writing:
                        raise writer.error
                snapshot = tuple(writer.snapshot() for writer in self._writers)
                if snapshot != last:
                    last = snapshot
                    yield snapshot
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()


@dataclass
class _LiveCompletion:
    """One completion while it is being generated.

    `numbers` holds, for each token, its probability, the entropy, and the ids and probabilities
    of the most likely tokens.
    """

    ids: list[int] = field(default_factory=list)
    numbers: list[tuple[float, float, list[int], list[float]]] = field(default_factory=list)
    state: str = "writing"
    trace: Trace | None = None


class _Writer:
    """Generates with one checkpoint in a thread; `snapshot` is called from another one."""

    def __init__(self, checkpoints: CheckpointCache, name: str, question: Question, stop: threading.Event) -> None:
        self.name = name
        self.error: Exception | None = None
        self._checkpoints, self._question, self._stop = checkpoints, question, stop
        self._loaded: LoadedCheckpoint | None = None
        self._eos: frozenset[int] = frozenset()
        self._live: list[_LiveCompletion] = []
        self._state, self._message, self._asked = "waiting", "", ""
        self._started, self._seconds = 0.0, 0.0

    def run(self) -> None:
        try:
            self._generate()
            self._state = "done"
        except Stopped:
            self._state = "stopped"
        except UserError as error:
            self._state, self._message = "failed", str(error)
        except (MemoryError, torch.OutOfMemoryError):
            self._state = "failed"
            self._message = "Out of memory; try fewer samples, a smaller image or fewer tokens."
        except Exception as error:
            self._state, self.error = "failed", error
        finally:
            for live in self._live:
                if live.state == "writing":
                    live.state = "stopped"

    def snapshot(self) -> CheckpointTraces:
        state = self._state  # read first: an ended one has nothing more to show
        if self._started and state == "writing":
            self._seconds = time.monotonic() - self._started
        traces = tuple(self._trace(completion) for completion in self._live)
        seconds = round(self._seconds, 1)
        return CheckpointTraces(self.name, state, self._message, self._asked, traces, seconds)

    def _generate(self) -> None:
        self._state = "loading"
        self._raise_if_stopped()
        self._loaded = loaded = self._checkpoints.get(self.name)
        self._eos = frozenset(loaded.processing.eos_ids)
        while not loaded.lock.acquire(timeout=0.1):
            self._raise_if_stopped()
        try:
            self._raise_if_stopped()
            question = self._question
            prompt = loaded.processing.prompt(self._example(loaded.processing.is_multimodal))
            room = loaded.context - question.max_new_tokens
            if len(prompt) > room:
                raise DataError(
                    f"Question and image are {len(prompt):,} tokens, but {self.name} has room for "
                    f"{max(room, 0):,} besides a completion of {question.max_new_tokens:,}. "
                    "Shorten the question, use a smaller image, or allow fewer tokens."
                )
            count = 1 if question.temperature == 0 else question.samples
            self._live = [_LiveCompletion() for _ in range(count)]
            self._started, self._state = time.monotonic(), "writing"
            sampling = SamplingSection(temperature=question.temperature, max_new_tokens=question.max_new_tokens)
            seed = derive_seed("playground", question.seed)
            loaded.engine.generate([prompt], count, sampling, [seed], on_tokens=self._watch)
            for live in self._live:
                if live.state == "writing":
                    live.state = "length"
        finally:
            loaded.lock.release()

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _example(self, reads_images: bool) -> Example:
        question = self._question
        if reads_images:
            self._asked = question.text
            images = () if question.image is None else (question.image,)
        else:
            self._asked, images = question.described or question.text, ()
        return Example("question", self._asked, question.answer, images, origin="Your question")

    def _watch(self, row_B: torch.Tensor, token_B: torch.Tensor, logits_BV: torch.Tensor) -> None:
        self._raise_if_stopped()
        logp_BV = logits_BV.log_softmax(-1)
        probability_BV = logp_BV.exp()
        entropy_B = -(probability_BV * logp_BV).sum(-1)
        sampled_B = probability_BV.gather(-1, token_B[:, None])[:, 0]
        top_BA, top_id_BA = probability_BV.topk(min(ALTERNATIVES, probability_BV.shape[-1]))
        columns = (row_B, token_B, sampled_B, entropy_B, top_id_BA, top_BA)
        for row, token, *numbers in zip(*(column.tolist() for column in columns), strict=True):
            live = self._live[row]
            live.numbers.append(tuple(numbers))
            live.ids.append(token)
            if token in self._eos:
                live.state = "stop"

    def _trace(self, live: _LiveCompletion) -> Trace:
        """Finished traces are built once, since grading and decoding tokens take time."""
        if live.trace is not None or self._loaded is None:
            return live.trace or Trace("", 0, live.state, "", "")
        state, ids = live.state, list(live.ids)
        processing = self._loaded.processing
        text = processing.decode(ids)
        if state == "writing":
            # The bytes of the last letter may not be complete yet.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        thought, answer = split_thinking(text, processing.opens_thinking)
        trace = Trace(text, len(ids), state, thought, answer)
        if state == "writing":
            return trace
        if state != "stopped":
            final = extract_answer(text)
            success = None
            if self._question.answer.strip():
                success = verify(self._question.answer, text, **self._question.grading)
            trace = replace(trace, final=final, success=success)
        live.trace = replace(trace, tokens=self._tokens(live))
        return live.trace

    def _tokens(self, live: _LiveCompletion) -> tuple[Token, ...]:
        assert self._loaded is not None
        decode = lru_cache(maxsize=None)(self._loaded.processing.tokenizer.decode)
        return tuple(
            Token(
                decode(token),
                probability,
                max(0.0, entropy),
                tuple((decode(i), p) for i, p in zip(top_ids, top, strict=True)),
            )
            for token, (probability, entropy, top_ids, top) in zip(live.ids, live.numbers, strict=False)
        )


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(reasoning, what follows it). `opened`: the prompt ended inside the reasoning.

    Unclosed reasoning extends to the end; text without any tag is all answer.
    """
    before, mark, after = text.rpartition("</think>")
    if not mark:
        head, opening, rest = text.partition("<think>")
        if opening:
            return f"{head}{rest}".strip(), ""
        return (text.strip(), "") if opened else ("", text.strip())
    return before.replace("<think>", "", 1).strip(), after.strip()
