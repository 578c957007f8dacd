"""Chat messages of other trainers -> a question with `<image>` markers, its system turn, and the turns before it.

Read are TRL's, verl's, ms-swift's and OpenAI's (`role` and `content`, which is text or a list of parts), LLaVA's
(`from` and `value`) and rounds (`human` and `assistant`), as lists or as such a list's text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mm_agrae.errors import DataError
from mm_agrae.tasks.images import SOURCES
from mm_agrae.tasks.rows import first_of, literal, show

ROLES = dict.fromkeys(("system", "developer"), "system") | dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant")
MARKER = "<image>"


class Chat(NamedTuple):
    """What a row asks. `images` holds for each marker, in order, its own source, or None for the row's next image."""

    question: Any
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Turns before the question: ("user" or "assistant", text)."""
    reply: str = ""
    """The assistant's turn at the end; "" for none."""
    images: Sequence[Any] = ()


def messages_in(value: Any) -> list[Any] | None:
    """The messages that a column's value holds; None if it is something else."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*[\"'](role|from|content|value)\b", value):
        value = literal(value)
    if not (isinstance(value, list | tuple) and value and isinstance(value[0], Mapping)):
        return None
    return list(value) if value[0].keys() & {"role", "from", "human"} else None


def read_chat(messages: Sequence[Any], origin: str) -> Chat:
    """Raises DataError naming the row for a role or a part that cannot be used."""
    turns: list[tuple[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(f"{origin}: messages: expected mappings with role and content, got {show(message)}")
        if "human" in message:
            turns += [("user", message["human"]), ("assistant", message.get("assistant"))]
            continue
        named = first_of(message, ("role", "from"))
        role = ROLES.get(str(named).lower())
        if role is None:
            raise DataError(
                f"{origin}: messages: a turn of role {show(named)}; only system, user and assistant turns are read"
            )
        turns.append((role, first_of(message, ("content", "value"))))
    reply = _text(turns.pop()[1], [], origin) if turns and turns[-1][0] == "assistant" else ""
    images: list[Any] = []
    texts = [(role, _text(content, images, origin)) for role, content in turns]
    if not texts or texts[-1][0] != "user":
        raise DataError(f"{origin}: messages: no user turn at the end of the prompt")
    system = "\n\n".join(text for role, text in texts if role == "system")
    history = tuple(turn for turn in texts[:-1] if turn[0] != "system")
    return Chat(texts[-1][1], system, history, reply, images)


def _text(content: Any, images: list[Any], origin: str) -> str:
    """A turn's text; what its markers stand for is added to `images`."""
    texts = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, Mapping):
            kind = str(part.get("type") or next((key for key in part if part[key] is not None), ""))
            if "video" in kind or "audio" in kind:
                part = f"<{'video' if 'video' in kind else 'audio'}>"
            elif "image" in kind:
                images.append(first_of(part, SOURCES))
                texts.append(MARKER)
                continue
            else:
                part = part.get("text")
        if not isinstance(part, str):
            raise DataError(f"{origin}: messages: expected text or a list of text and image parts, got {show(part)}")
        images += [None] * part.count(MARKER)
        texts.append(part)
    return "".join(texts)
