"""What a study looks at: models and prompt sets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from clifflab.config.base import Section, Slug, model_name, possible_path, slug
from clifflab.text.formats import FORMATS

COLUMN_ROLES = ("prompt", "messages", "id", "group", "label", "thinking", "response", "category", "target")
REPAIRED = "repair:"  # an adapter that this study makes


class ModelSpec(Section):
    """One model of the study.

    Attributes:
        name: Folder name of its results.
        path: ``organism:planted`` (shipped), a checkpoint folder, a ``.gguf`` file, ``package:MODULE`` (an installed
            Python package that holds one ``.gguf`` file), or a model id of the Hugging Face hub.
        revision: Hub revision (commit, tag or branch).
        dtype: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        thinking_format: How the model writes its thinking; ``auto`` reads it off the chat template.
        system: System message put before every prompt that has none.
        trust_remote_code: Run code that comes with the checkpoint.
        adapter: Folder of a PEFT adapter that is merged into it, or ``repair:MODEL`` for what this study's repair of
            another model makes.
        before: Name of the model that it is compared with, before and after.
        engine: What runs it.
        gpus: GPUs of one worker: a fraction shares a GPU, more than one splits the model over several of one machine.
            ``auto`` takes as many as its weights need.
        replicas: Most workers that hold it at a time; ``auto`` lets idle ones join.
    """

    name: Slug
    path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    thinking_format: str = "auto"
    system: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = Field(default=None, min_length=1)
    before: str | None = None
    engine: Literal["transformers"] = "transformers"
    gpus: Literal["auto"] | float = "auto"
    replicas: Literal["auto"] | int = "auto"

    _check_name = field_validator("name")(model_name)

    @field_validator("path", "adapter")
    @classmethod
    def _possible(cls, value: str | None) -> str | None:
        return value if value is None else possible_path(value)

    @property
    def repairs(self) -> str | None:
        """Name of the model whose repair makes this one."""
        return self.adapter.removeprefix(REPAIRED) if self.adapter and self.adapter.startswith(REPAIRED) else None

    @field_validator("gpus")
    @classmethod
    def _whole_gpus(cls, value: str | float) -> str | float:
        if isinstance(value, float) and (value <= 0 or (value > 1 and value != int(value))):
            raise ValueError("give auto, a share of one GPU such as 0.5, or a whole number")
        return value

    @field_validator("replicas")
    @classmethod
    def _some_replicas(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("give at least 1, or auto")
        return value

    @field_validator("thinking_format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS:
            raise ValueError(f"unknown thinking format; choose auto, {', '.join(FORMATS)}")
        return value


class PromptSet(Section):
    """One named set of prompts, or of existing traces.

    Attributes:
        name: The set's name in every table.
        path: JSONL, JSON, CSV or Parquet file, a folder of a saved Hugging Face dataset, ``hf:NAME[:SPLIT]``, or
            ``organism:SET`` for a set of the planted-cliff language (``organism:corpus`` mixes them as a safety corpus
            does).
        label: Whether the set's requests are harmful; a ``label`` column that ``columns`` names overrides it row by
            row, as the rows of ``organism:corpus`` do by themselves. A corpus may be ``unlabelled``.
        limit: Use the first rows only.
        columns: Which column plays which role, where names differ from the usual ones.
        existing: Rows hold finished traces (``thinking`` and ``response``, or ``<think>`` inline) that are measured
            and not generated.
        seed: Seed of an ``organism:`` set.
        ood: Held out of probe training as a whole: an out-of-distribution test.
    """

    name: Slug
    path: str = Field(min_length=1)
    label: Literal["harmful", "benign", "unlabelled"]
    limit: int | None = Field(default=None, ge=1)
    columns: dict[str, str] = Field(default_factory=dict)
    existing: bool = False
    seed: int = Field(default=0, ge=0)
    ood: bool = False

    _check_name = field_validator("name")(slug)
    _check_path = field_validator("path")(possible_path)

    @field_validator("columns")
    @classmethod
    def _known_roles(cls, value: dict[str, str]) -> dict[str, str]:
        for role in value:
            if role not in COLUMN_ROLES:
                raise ValueError(f"unknown role {role!r}; roles are {', '.join(COLUMN_ROLES)}")
        return value

    @model_validator(mode="after")
    def _organism_needs_rows(self) -> PromptSet:
        if self.path.startswith("organism:") and self.limit is None:
            raise ValueError("an organism: set needs limit, the number of prompts to write")
        return self
