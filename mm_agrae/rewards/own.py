"""Reward functions of the user's: which signature they have, and how they are called.

Ours is `(example, completion) -> float | None`, one completion a call. TRL's is
`(completions, **columns) -> list`, the completions of one prompt a call: `prompts`, `completions` and
`completion_ids`, and every column of the data, as lists of one value per completion. Either may be a function, a
partial, a class without arguments or an instance of one.

A function of either kind that names `images`, `image_sizes` or `shown_sizes` gets the example's pictures (upright RGB,
of the original size) and the width and height in pixels of each, as stored and as the model sees it.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mm_agrae.config.plugins import load_object
from mm_agrae.errors import ConfigError
from mm_agrae.grading.pool import describe
from mm_agrae.types import Completion, Example

ABOUT_IMAGES = ("images", "image_sizes", "shown_sizes")
_OTHER_FORM = (TypeError, AttributeError, KeyError, IndexError)  # what text taken for a message raises, and vice versa


class OwnPart:
    """A reward function of the user's by its import name. Raises ConfigError if it fits neither signature.

    `batched`: it has TRL's signature. `wants`: those of `ABOUT_IMAGES` that it names. `where`: its file and line.
    """

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
        self.wants = [name for name in ABOUT_IMAGES if name in named]
        self.names, self.required = named, _required(signature)
        self.batched = "completions" in named or (self.takes_any and not _accepts(signature, 2, self.wants))
        by_name = _accepts(signature, 0, named)
        text = any(each.annotation in (str, "str", dict, "dict") for each in [*parameters.values()][:2])
        if not (by_name if self.batched else _accepts(signature, 2, self.wants) and not text):
            raise ConfigError(
                f"{name.rpartition(':')[2]}{signature} is called neither as (example, completion), for one, "
                "nor as TRL's (completions, **columns), for a list of them; write it as one of the two"
            )
        code = getattr(getattr(found, "func", found), "__code__", None)
        code = code or getattr(type(found).__call__, "__code__", None)
        self.where = f"{code.co_filename}:{code.co_firstlineno}" if code else name
        self._as_messages: bool | None = None  # not known before a call has worked

    def __call__(self, example: Example, completions: Sequence[Completion]) -> list[Any]:
        """The function's values for completions of one example, of which ours takes one. Raises what it raises."""
        about: dict[str, Any] = {"image_sizes": example.image_sizes, "shown_sizes": example.shown_sizes}
        if "images" in self.wants:
            about["images"] = [_decode(source) for source in example.images]
        if not self.batched:
            return [self.function(example, completions[0], **{name: about[name] for name in self.wants})]
        columns = {"question": example.question, "answer": example.answer, "id": example.id}
        columns |= {**example.meta, **example.columns, **about}
        asked = columns.get("prompt") or columns.get("messages") or columns.get("conversations")
        is_chat = isinstance(asked, list | tuple)
        forms = [is_chat, not is_chat] if self._as_messages is None else [self._as_messages]
        for as_messages in forms:
            given: dict[str, list[Any]] = {name: [value] * len(completions) for name, value in columns.items()}
            given["completion_ids"] = [list(each.token_ids) for each in completions]
            texts = [each.text for each in completions]
            given["completions"] = [_messages("assistant", text) for text in texts] if as_messages else texts
            prompt: Any = (
                (asked if is_chat else _messages("user", example.question)) if as_messages else example.question
            )
            given["prompts"] = [prompt] * len(completions)
            if missing := [name for name in self.required if name not in given]:
                raise LookupError(f"no column {', '.join(missing)} in this row, which has {', '.join(columns)}")
            taken = {name: value for name, value in given.items() if self.takes_any or name in self.names}
            try:
                values = self.function(**taken)
                values = asyncio.run(values) if inspect.iscoroutine(values) else values
            except _OTHER_FORM:
                if as_messages is forms[-1]:
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


def _messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _decode(source: Any) -> Any:
    from PIL import Image, ImageOps

    if not isinstance(source, Image.Image):
        source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    return ImageOps.exif_transpose(source).convert("RGB")
