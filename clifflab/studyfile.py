"""Studies as YAML: reading with overrides, one line for the first mistake, writing back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clifflab.config import JudgeConfig, ModelSpec, RepairConfig, Study
from clifflab.errors import ConfigError, refuse_secret_address, shorten

T = TypeVar("T", bound=BaseModel)


def load_study(path: Path, overrides: tuple[str, ...] = (), data_dir: Path | None = None) -> Study:
    """Read a study file and apply ``key=value`` overrides.

    Args:
        path: A YAML file.
        overrides: Dotted keys with YAML values: ``traces.samples=4``, ``models.0.path=DIR``.
        data_dir: Folder of prompt files: relative paths of prompt sets that are not beside the study count from there.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds a wrong or unknown key; or ``data_dir`` is no folder.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError("--data", data_dir, "no such folder", "give the folder that holds the study's prompt files")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("study", path, "no such file", "give the path of a study's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("study", path, f"cannot be read ({error})", "give the path of a study's YAML file") from None
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or shorten(error, 60)
        raise ConfigError("study", path, f"malformed YAML{where}: {problem}", "mend that line") from None
    if not isinstance(data, dict):
        raise ConfigError("study", path, "holds no mapping", "start from jobs/quickstart.yaml")
    for override in overrides:
        _apply_override(data, override)
    return parse_study(data, base=path.parent, data_dir=data_dir)


def parse_study(data: dict[str, Any], base: Path | None = None, data_dir: Path | None = None) -> Study:
    """Validate a study given as plain data; relative paths count from ``base`` where they exist there.

    Args:
        data: The study.
        base: Its folder.
        data_dir: Where the relative paths of prompt sets count from next.

    Raises:
        ConfigError: Names the first wrong field, its value and the remedy; an address that holds a credential is one.
    """
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise _config_error(error) from None
    _refuse_secrets(study.model_dump(), "")
    if base is None:
        return study
    folders = [base] if data_dir is None else [base, data_dir]
    prompts = tuple(p.model_copy(update={"path": _relative(p.path, *folders)}) for p in study.prompts)
    models = tuple(_relative_model(m, base) for m in study.models)
    judge, repair = _relative_judge(study.judge, base), _relative_repair(study.repair, folders)
    return study.model_copy(update={"prompts": prompts, "models": models, "judge": judge, "repair": repair})


def parse_section(kind: type[T], overrides: tuple[str, ...]) -> T:
    """One part of a configuration from ``key=value`` settings alone.

    Raises:
        ConfigError: Names the first wrong setting, its value and the remedy.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        _apply_override(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _config_error(error) from None


def dump_study(study: Study) -> str:
    """The resolved study as YAML that :func:`load_study` reads back."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _refuse_secrets(part: object, field: str) -> None:
    """Fail where any text of a study, read so far, is an address with a credential in it."""
    if isinstance(part, str):
        refuse_secret_address(field, part)
    elif isinstance(part, dict | list | tuple):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            _refuse_secrets(value, f"{field}.{key}" if field else str(key))


def _relative(path: str, *folders: Path) -> str:
    """The path in the first folder that has it, else as it stands; a link keeps its own name."""
    found = (folder / path for folder in folders if not Path(path).is_absolute())
    return next((_absolute(candidate) for candidate in found if os.path.exists(candidate)), path)


def _absolute(path: Path) -> str:
    """The path without ``..``, unless a link stands before that and would be left out."""
    short = os.path.abspath(path)
    return short if os.path.exists(short) and os.path.samefile(short, path) else str(path.resolve())


def _relative_model(model: ModelSpec, base: Path) -> ModelSpec:
    adapter = _relative(model.adapter, base) if model.adapter else None
    return model.model_copy(update={"path": _relative(model.path, base), "adapter": adapter})


def _relative_repair(repair: RepairConfig, folders: list[Path]) -> RepairConfig:
    corpus = tuple(p.model_copy(update={"path": _relative(p.path, *folders)}) for p in repair.corpus)
    choices = tuple(c.model_copy(update={"path": _relative(c.path, *folders)}) for c in repair.evaluate.choices)
    return repair.model_copy(
        update={"corpus": corpus, "evaluate": repair.evaluate.model_copy(update={"choices": choices})}
    )


def _relative_judge(judge: JudgeConfig, base: Path) -> JudgeConfig:
    guard = judge.guard
    if guard:
        found = {name: getattr(guard, name) for name in ("path", "template")}
        guard = guard.model_copy(update={name: _relative(path, base) for name, path in found.items() if path})
    return judge.model_copy(update={"guard": guard, "labels": _relative(judge.labels, base) if judge.labels else None})


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError("--set", override, "is not key=value", "write e.g. --set traces.samples=4")
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError("--set", override, "the value is not YAML", "quote it") from None
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError("--set", override, "the key goes through a plain value", "check the key's spelling")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError("--set", override, f"no item {part!r} in a list of {len(node)}", "count from 0")
        return node[int(part)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise ConfigError("--set", override, "the key goes through a plain value", "check the key's spelling")


def _config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "study"
    more = error.error_count() - 1
    suffix = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    value: object = first.get("input")
    if first["type"] == "extra_forbidden":
        return ConfigError(field, value, "unknown key", f"check its spelling or remove it{suffix}")
    if first["type"] == "missing":
        return ConfigError(field, "(absent)", "is required", f"add it{suffix}")
    if isinstance(value, dict | list):
        value = shorten(value, 60)
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(field, value, "not valid", f"{message}{suffix}")
