"""Reward functions of the user's: which signature they have, and how they are called.

Ours is `(example, completion) -> float | None`, one completion a call. TRL's is
`(completions, **columns) -> list`, the completions of one prompt a call: `prompts`, `completions` and
`completion_ids`, and every column of the data, as lists of one value per completion. Either may be a function, a
partial, a class without arguments or an instance of one.

A function of either kind that names `images`, `image_sizes` or `shown_sizes` gets the example's pictures (RGB, of the
original size) and the width and height in pixels of each, as stored and as the model sees it.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mm_agrae.config.plugins import load_object
from mm_agrae.errors import ConfigError
from mm_agrae.grading.pool import describe
from mm_agrae.tasks.images import open_image
from mm_agrae.types import Completion, Example

ABOUT_IMAGES = ("images", "image_sizes", "shown_sizes")
_OTHER_FORM = (TypeError, AttributeError, KeyError, IndexError)  # what text taken for a message raises, and vice versa


class About(NamedTuple):
    batched: bool
    """It has TRL's signature."""
    wants: list[str]
    """Those of `ABOUT_IMAGES` that it names."""
    where: str
    """Its file and line."""


class OwnPart:
    """A reward function of the user's by its import name. Raises ConfigError if it fits neither signature."""

    def __init__(self, name: str):
        found = load_object(name)
        if inspect.isclass(found):
            if missing := _required(inspect.signature(found)):
                raise ConfigError(f"the class needs {', '.join(missing)}; name an instance of it instead")
            found = found()
        self.function: Callable[..., Any] = found
        signature = inspect.signature(found)
        parameters = signature.parameters
        self.takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        named = [name for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        wants = [name for name in ABOUT_IMAGES if name in named]
        self.names, self.required = named, _required(signature)
        batched = "completions" in named or (self.takes_any and not _accepts(signature, 2, wants))
        by_name = _accepts(signature, 0, named)
        text = any(each.annotation in (str, "str", dict, "dict") for each in [*parameters.values()][:2])
        if not (by_name if batched else _accepts(signature, 2, wants) and not text):
            raise ConfigError(
                f"{name.rpartition(':')[2]}{signature} is called neither as (example, completion), for one, "
                "nor as TRL's (completions, **columns), for a list of them; write it as one of the two"
            )
        code = getattr(getattr(found, "func", found), "__code__", None)
        code = code or getattr(type(found).__call__, "__code__", None)
        self.about = About(batched, wants, f"{code.co_filename}:{code.co_firstlineno}" if code else name)
        self._as_messages: bool | None = None  # not known before a call has worked

    def __call__(self, example: Example, completions: Sequence[Completion]) -> list[Any]:
        """The function's values for completions of one example, of which ours takes one. Raises what it raises."""
        about: dict[str, Any] = {"image_sizes": example.image_sizes, "shown_sizes": example.shown_sizes}
        if "images" in self.about.wants:
            about["images"] = [open_image(source, origin=example.origin) for source in example.images]
        if not self.about.batched:
            return [self.function(example, completions[0], **{name: about[name] for name in self.about.wants})]
        columns: dict[str, Any] = {"question": example.question, "answer": example.answer, "id": example.id}
        columns |= {**example.meta, **example.columns, **about}
        turns = [("system", example.system), *example.history, ("user", example.question)]
        chat = [{"role": role, "content": text} for role, text in turns if text]
        prompt = columns["prompt"] if isinstance(columns.get("prompt"), list) else chat
        is_chat = any(isinstance(columns.get(name), list) for name in ("prompt", "messages", "conversations"))
        for as_messages in [is_chat, not is_chat] if self._as_messages is None else [self._as_messages]:
            columns["prompts"] = prompt if as_messages else example.question
            given: dict[str, list[Any]] = {name: [value] * len(completions) for name, value in columns.items()}
            given["completion_ids"] = [list(each.token_ids) for each in completions]
            given["completions"] = [
                [{"role": "assistant", "content": each.text}] if as_messages else each.text for each in completions
            ]
            if missing := [name for name in self.required if name not in given]:
                raise LookupError(f"no column {', '.join(missing)} in this row, which has {', '.join(columns)}")
            taken = {name: value for name, value in given.items() if self.takes_any or name in self.names}
            try:
                values = self.function(**taken)
                values = asyncio.run(values) if inspect.iscoroutine(values) else values
            except _OTHER_FORM:
                if self._as_messages is not None or as_messages is not is_chat:
                    raise
                continue
            self._as_messages = as_messages
            break
        values = values.tolist() if hasattr(values, "tolist") else values  # numpy, torch
        if len(completions) == 1 and not isinstance(values, list | tuple):
            return [values]
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            what = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
            raise ValueError(f"returned {what} for {len(completions)} completions")
        return list(values)


def located(error: BaseException, file: str) -> str:
    """What a function raised and where, innermost: in this file, or if none is named, in any."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next((each for each in frames if file in ("", each.filename)), None)
    return f"{describe(error)} ({frame.filename}:{frame.lineno})" if frame else describe(error)


def _required(signature: inspect.Signature) -> list[str]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [n for n, each in signature.parameters.items() if each.default is each.empty and each.kind not in variable]


def _accepts(signature: inspect.Signature, positional: int, names: Sequence[str]) -> bool:
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(names))
    except TypeError:
        return False
    return True
