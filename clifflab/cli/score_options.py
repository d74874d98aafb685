"""Options of ``clifflab score``: what they say, what does not go together, what errors call them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import ConfigError, OutputError, UserError

if TYPE_CHECKING:
    from clifflab.config import RuntimeConfig

# What other parts of clifflab call the options of this command, in the fields and the remedies of their errors.
_FIELDS = {
    "models.path": "--model",
    "thinking_format": "--thinking-format",
    "input": "--input",
    "output": "--output",
    "probes": "--probes",
}
_REMEDIES = ((re.compile(r"--out\b"), "--output"), (re.compile(r"\brun the study again\b"), "run again"))


@contextmanager
def named(folder: str) -> Iterator[None]:
    """Errors name this command's options; ``folder`` is the one that gave the folder of the results."""
    try:
        yield
    except UserError as error:
        remedy = error.remedy
        for pattern, words in _REMEDIES:
            remedy = pattern.sub(words, remedy)
        field = folder if error.field == "output" else _FIELDS.get(error.field, error.field)
        raise type(error)(field, error.value, error.problem, remedy) from None


def place_of(option: str, text: str) -> Path:
    """A local folder from what was typed; a path would lose an address's second slash."""
    if text.startswith("file:///"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise OutputError(option, text, "is no local folder", "give a folder that all workers see, or file:///FOLDER")
    from clifflab.cli.run import given_path

    return given_path(option, text).absolute()


def check_alone(context: click.Context) -> None:
    """--verify takes all else from the job that it checks."""
    from click.core import ParameterSource

    for option in context.command.params:
        typed = option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if typed and option.name not in ("verify", "verify_rows"):
            remedy = "give --verify DIR alone, or with --rows"
            raise ConfigError(option.opts[0], context.params.get(option.name), "does not go with --verify", remedy)


def check_used(verify_rows: int | None, given: dict[str, Any]) -> None:
    """Options that would do nothing."""
    if verify_rows is not None:
        raise ConfigError("--rows", verify_rows, "belongs to --verify", "for the first rows alone give --max-rows")
    if given["max_new_tokens"] is not None and not given["generate"]:
        raise ConfigError("--max-new-tokens", given["max_new_tokens"], "belongs to --generate", "add --generate")
    if given["set_name"] is not None and not given["set_name"].strip():
        raise ConfigError("--name", given["set_name"], "is empty", "give the set a name, or leave it out")


def check_apart(pattern: str, place: Path) -> None:
    """The results must not become rows of the input: a later run would find other files than the first."""
    from clifflab.scoring.job import BLOCKS, EVENTS, PARTS, REJECTS, SCORES, TRACES
    from clifflab.scoring.sources import would_read

    own = (BLOCKS, EVENTS, PARTS, *(f"{kind}/part-00000000.parquet" for kind in (SCORES, REJECTS, TRACES)))
    if any(would_read(pattern, place / name) for name in own):
        raise OutputError("--output", place, f"lies where --input looks ({pattern})", "choose a folder outside of it")


def check_workers(settings: RuntimeConfig, min_workers: int | None, given: dict[str, Any]) -> None:
    """Fewest workers, most workers, and no workers at all."""
    if settings.kind == "inline":
        workers = given["workers"] if (given["workers"] or 0) > 1 else None
        names = {"--workers": workers, "--min-workers": min_workers, "--object-store": given["object_store_mb"]}
        for name, value in names.items():
            if value is not None:
                raise ConfigError(name, value, "does nothing in one process", "leave it out, or use --runtime ray")
    if min_workers is None:
        return
    if settings.address is not None and settings.workers == "auto":
        return  # the cluster is counted when it is joined
    auto = settings.workers == "auto"
    most = _places() if isinstance(settings.workers, str) else settings.workers
    if min_workers > most:
        problem = f"is above the {most} places of this machine" if auto else "is above --workers"
        raise ConfigError("--min-workers", min_workers, problem, f"give at most {most}{', or --workers' * auto}")


def _places() -> int:
    """Most workers that Ray finds a place for by itself: one a GPU, or else one a core."""
    import os

    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1


def roles(given: Sequence[str]) -> dict[str, str]:
    """Columns by role, from ``ROLE=NAME``."""
    columns = dict[str, str]()
    for text in given:
        role, column = _role(text)
        if role in columns:
            raise ConfigError("--column", text, f"names the {role} a second time", "give each role once")
        columns[role] = column
    return columns


def _role(text: str) -> tuple[str, str]:
    role, separator, name = text.partition("=")
    if not separator or not role or not name:
        raise ConfigError("--column", text, "is not ROLE=NAME", "write e.g. --column prompt=instruction")
    return role, name
