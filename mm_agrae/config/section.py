"""What every section of a config is made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
on_or_off = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)
"""YAML reads a bare on or off as true or false."""

SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_?key|private_?key|secret|password|passwd|credentials?|token)", re.IGNORECASE
)
URL_SECRET = re.compile(r"(\w://)[^/@\s]+@")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
