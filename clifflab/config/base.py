"""The base of all parts of a study's configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SLUG = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}\Z")

# What a study keeps in its results beside the folders of its models: a model of such a name would write over it.
OWN_FOLDERS = frozenset({"corpus", "figures", "files", "logs", "repair"})
OWN_SUFFIXES = (
    ".html", ".json", ".jsonl", ".lock", ".log", ".parquet", ".pdf", ".png", ".safetensors", ".tmp", ".txt", ".yaml",
)  # fmt: skip
_LONGEST_PART, _LONGEST_PATH = 255, 4000  # bytes


class Section(BaseModel):
    """Base of all parts: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def slug(value: str) -> str:
    """Check that a name is safe as a folder name."""
    if not SLUG.match(value):
        raise ValueError("use letters, digits, '.', '_' and '-', at most 80, starting with a letter or digit")
    return value


def model_name(value: str) -> str:
    """Check that a name is safe as the folder of a model's results, beside the study's own files and folders."""
    slug(value)
    if value.casefold() in OWN_FOLDERS or value.casefold().endswith(OWN_SUFFIXES):
        raise ValueError("is or may become a name of the study's own in its results; choose another")
    return value


def possible_path(value: str) -> str:
    """Check that text can be asked for as a path: the system answers some with errors of its own."""
    parts = [part.encode("utf-8", "surrogatepass") for part in value.split("/")]
    if max(map(len, parts)) > _LONGEST_PART or sum(map(len, parts)) + len(parts) > _LONGEST_PATH:
        raise ValueError("is too long for a path")
    if "\0" in value:
        raise ValueError("holds a zero byte")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~ and a name that no user here has") from None
    return value


Slug = Annotated[str, Field(description="A name that is safe as a folder name.")]
