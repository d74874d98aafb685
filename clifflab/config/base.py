"""The base of all parts of a study's configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SLUG = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}\Z")


class Section(BaseModel):
    """Base of all parts: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def slug(value: str) -> str:
    """Check that a name is safe as a folder name."""
    if not SLUG.match(value):
        raise ValueError("use letters, digits, '.', '_' and '-', at most 80, starting with a letter or digit")
    return value


Slug = Annotated[str, Field(description="A name that is safe as a folder name.")]
