"""Stage ``prompts``: sources to one table of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_json, write_json, write_parquet
from clifflab.config import Study
from clifflab.data import read_prompts, source_hash
from clifflab.errors import InputError
from clifflab.stages.base import Context, Layout, Step, Unit


class PromptsStep(Step):
    """Reads every prompt set, one unit each, and numbers the rows in the study's order."""

    name = "prompts"
    per_model = False
    loads = False
    suffix = ".json"

    def settings(self, study: Study) -> Any:
        """All prompt sets without their paths (sources enter by their content) and what is done with them later."""
        return [p.model_dump(mode="json", exclude={"path", "ood"}) for p in study.prompts]

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Prompts and their rejects, of the whole study."""
        return [layout.root / "prompts.parquet", layout.root / "prompt_rejects.parquet"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit a set."""
        sources = context.identities.sources
        return [
            Unit(self.name, None, f"{i:03d}-{p.name}", {"index": i, "source": sources[i]})
            for i, p in enumerate(context.study.prompts)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Read one source.

        Raises:
            InputError: It cannot be used, or is no longer what it was when the run began.
        """
        index = unit.payload["index"]
        spec = context.study.prompts[index]
        prompts, rejects = read_prompts(spec, f"prompts.{index}")
        if source_hash(spec.path) != unit.payload["source"]:
            raise InputError(f"prompts.{index}.path", spec.path, "changed while the study ran", "run it again")
        write_json(context.part(unit), {"prompts": prompts, "rejects": rejects})
        return {"rows": len(prompts), "rejects": len(rejects)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the sets."""
        prompts: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        for unit in self.plan(context, None):
            part = read_json(context.part(unit))
            prompts += part["prompts"]
            rejects += part["rejects"]
        for row, prompt in enumerate(prompts):
            prompt["row"] = row
        out, out_rejects = self.outputs(context.layout, None)
        write_parquet(out, pa.Table.from_pylist(prompts, schema=tables.PROMPTS))
        write_parquet(out_rejects, pa.Table.from_pylist(rejects, schema=tables.REJECTS))
        return {"prompts": len(prompts), "rejects": len(rejects)}


def pack_rejects(table: pa.Table, rejects: list[dict[str, Any]]) -> pa.Table:
    """Carry rejects inside a unit's table file."""
    return table.replace_schema_metadata({"rejects": json.dumps(rejects)})


def unpack_rejects(table: pa.Table) -> list[dict[str, Any]]:
    """Rejects that :func:`pack_rejects` put into a table."""
    return list(json.loads((table.schema.metadata or {}).get(b"rejects", b"[]")))
