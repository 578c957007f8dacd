"""`mm-agrae variants --prepare`: other wordings and worked steps of problems, from any chat model, offline.

A wording is kept if it has the question's image markers and numbers and is not the question; steps, if the reply ends
in a box with the gold answer, and those before the first that holds it. The model is loaded here, by the engine of the
config (hf or vllm), or is a server with OpenAI's chat completions at an address.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from mm_agrae.config import Config
from mm_agrae.config.section import URL_SECRET
from mm_agrae.errors import ConfigError, EngineError
from mm_agrae.evaluation.evaluate import build_engine
from mm_agrae.evaluation.evaluate import run as sample
from mm_agrae.grading.accuracy import verify
from mm_agrae.progress import Reporter
from mm_agrae.run.files import append_line, explained, to_json
from mm_agrae.tasks import load_all
from mm_agrae.tasks.images import encode_png, open_image
from mm_agrae.tasks.variants import holds_answer, markers, read_lines
from mm_agrae.types import Completion, Example, Score

Ask = Callable[[Sequence[Example]], list[str]]
"""Questions, with their pictures -> replies; empty where there is none."""

KEY_VARIABLE = "MM_AGRAE_CHAT_KEY"
"""Environment variable with the key of the address, if it asks for one."""
TRIES, FIRST_PAUSE_S, LIMIT_S, AT_ONCE = 4, 2.0, 300.0, 16
_BATCH = 64
_WORDINGS = """Write five versions of the question below. They have the same answer, and all its numbers and \
conditions, but clearly another wording and structure; some may be longer, some shorter. Keep image markers as they \
are. Do not answer it. Put each version between <version> and </version>.

Question:
{question}"""
_STEPS = """As a mathematician, solve the problem below in three to five steps, each resting on the one before; the \
first says what is given and, if there is a picture, what it shows. Put each step between <step> and </step>. Leave \
the final answer out of the steps, and put it into \\boxed{{}} after them.

Problem:
{question}"""


def prepare(config: Config, out: Path, *, model: str, address: str, count: int | None) -> int:
    """Write a line for each of the first `count` training problems for which something is found; those that `out` has
    already are left out. Returns the exit status.

    Raises ConfigError if neither a model nor an address is given, EngineError for an address that does not answer,
    RunFolderError if `out` cannot be written.
    """
    reporter = Reporter()
    task = load_all(config.data.train, on_bad_row=config.data.on_bad_row)
    done = {row["id"] for _, row in read_lines(out)} if out.exists() else set()
    every = (task[index] for index in range(min(count or len(task), len(task))))
    examples = [example for example in every if example.id not in done]
    counts: Counter[str] = Counter()
    with (
        explained(out.parent, f"writing {out.name}"),
        _asking(config, model, address) as ask,
        reporter.bars(),
        reporter.bar("preparing", len(examples), lines=True) as advance,
    ):
        out.parent.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(examples), _BATCH):
            batch = examples[start : start + _BATCH]
            wordings, solutions = (
                ask([replace(each, question=text.format(question=each.question)) for each in batch])
                for text in (_WORDINGS, _STEPS)
            )
            for example, versions, solution in zip(batch, wordings, solutions, strict=True):
                found = {"wordings": kept_wordings(example, versions), "steps": kept_steps(example, solution)}
                if any(found.values()):
                    append_line(out, to_json({"id": example.id, **found}))
                counts["wordings"] += len(found["wordings"])
                counts["with steps"] += bool(found["steps"])
            advance(len(batch))
    reporter.say(
        f"{len(examples):,} problems asked for ({len(done):,} were there): kept {counts['wordings']:,} wordings, and "
        f"the steps of {counts['with steps']:,}; in {out}. Train with rollout.variants.prepared={out}"
    )
    return 0


def kept_wordings(example: Example, reply: str) -> list[str]:
    """Versions in a reply with the question's image markers and numbers, in other words, without the answer."""
    found = [text.strip() for text in re.findall(r"<version>(.*?)</version>", reply, re.DOTALL)]
    # A model that sees pictures in the place of markers may write none: those stand in front, then.
    first = "".join(f"{marker}\n" for marker in markers(example.question))
    found = [text if not text or markers(text) else first + text for text in found]
    same = [
        text
        for text in dict.fromkeys(found)
        if text
        and text.casefold() != example.question.strip().casefold()
        and markers(text) == markers(example.question)
        and _numbers(text) == _numbers(example.question)
        and (holds_answer(example.question, example) or not holds_answer(text, example))
    ]
    return same[:5]


def kept_steps(example: Example, reply: str) -> list[str]:
    """The steps in a reply whose final answer is the gold one, up to the first that holds it."""
    steps = [text.strip() for text in re.findall(r"<step>(.*?)</step>", reply, re.DOTALL) if text.strip()]
    grading = {name: value for name, value in example.grading.items() if name != "grader"}
    if not steps or not verify(example.answer, reply, **grading | {"answer_in": ("boxed",)}):
        return []
    return list(takewhile(lambda step: not holds_answer(step, example), steps))


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"<image ?[0-9]{0,3}>", "", text)))


class _Unscored:
    """In the place of a `Rewarder`, where replies alone are of interest."""

    def score(self, examples: Sequence[Example], completions: Sequence[Completion], stop: bool = False) -> list[Score]:
        return [Score(0.0, False, {}) for _ in completions]


@contextlib.contextmanager
def _asking(config: Config, model: str, address: str) -> Iterator[Ask]:
    if not model:
        raise ConfigError("--prepare needs a chat model: --model PATH, or --address URL with --model NAME")
    if address:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            chat = partial(_chat, address, model, config.evaluate.max_new_tokens)
            yield lambda examples: [*pool.map(chat, examples)]
        return
    # What the config asks of answers is not asked of these.
    config = config.model_copy(update={"prompt": config.prompt.model_copy(update={"instruction": "", "system": ""})})
    section = config.evaluate.model_copy(update={"samples": 1, "temperature": 0.0, "greedy": False})
    processing, _, engine = build_engine(config, model)

    def ask(examples: Sequence[Example]) -> list[str]:
        every = range(len(examples))
        found = sample(engine, processing, _Unscored(), examples, every, section, on_bad_row="skip")
        replies = {problem.index: problem.records[0].completion for problem in found}
        return [replies.get(index, "") for index in every]

    with contextlib.closing(engine):
        yield ask


def _chat(address: str, model: str, max_tokens: int, example: Example) -> str:
    """The reply of a server with OpenAI's chat completions. Raises EngineError if it does not give one."""
    import requests

    images = (encode_png(open_image(source, origin=example.origin or example.id)) for source in example.images)
    urls = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": example.question})
    message = {"role": "user", "content": content if urls else example.question}
    body: Any = {"model": model, "messages": [message], "temperature": 0, "max_tokens": max_tokens}
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY_VARIABLE)) else {}
    url, problem = f"{address.rstrip('/')}/chat/completions", ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            answer = requests.post(url, json=body, headers=headers, timeout=LIMIT_S)
            if answer.status_code == 200:
                return str(answer.json()["choices"][0]["message"]["content"] or "")
            problem = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                break  # trying again changes nothing
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
    url = URL_SECRET.sub(r"\1", url)
    raise EngineError(f"{url}: {problem}; what was prepared so far is kept, and the same command goes on")
