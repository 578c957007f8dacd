"""What every section of a config is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
OnOrOff = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)
"""YAML reads a bare on or off as true or false."""

SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_?key|private_?key|secret|password|passwd|credentials?|token)", re.IGNORECASE
)
URL_SECRET = re.compile(r"(\w://)[^/@\s]+@")


def plain(value: Any) -> Any:
    """Tuples for lists, which strict mode does not take for them, and numbers for text such as 1e-6; at all depths."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(plain(item) for item in value)
    return number(value)


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people write learning rates that way."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    _plain = model_validator(mode="before")(plain)
