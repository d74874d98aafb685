"""Stage ``corpus``: the requests from which the examples of a repair come, without those that are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_json, read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.data import read_prompts, source_hash
from clifflab.errors import InputError
from clifflab.repair.decontaminate import contaminated
from clifflab.stages.base import Context, Layout, Step, Unit

CONTAMINATED, SHARED = "contaminated", "shared_group"


class CorpusStep(Step):
    """Reads every set of the corpus, one unit each; what is too near to a prompt of the study goes to the rejects."""

    name = "corpus"
    per_model = False
    loads = False
    inputs = ("prompts",)
    suffix = ".json"

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Only a repair has one."""
        return any(study.repairs(spec) for spec in study.models)

    def settings(self, study: Study) -> Any:
        """The sets without their paths (sources enter by their content), and what is too near."""
        sets = [p.model_dump(mode="json", exclude={"path", "ood"}) for p in study.repair.corpus]
        select = study.repair.select.model_dump(mode="json", include={"decontaminate", "shared_groups"})
        return {"sets": sets, **select}

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """The sources, by content."""
        return [source_hash(p.path) for p in study.repair.corpus] or None

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The corpus and its rejects."""
        return [layout.root / "corpus.parquet", layout.root / "corpus_rejects.parquet"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit a set."""
        sources = context.identities.reads[self.name]
        return [
            Unit(self.name, None, f"{i:03d}-{p.name}", {"index": i, "source": sources[i]})
            for i, p in enumerate(context.study.repair.corpus)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Read one source.

        Raises:
            InputError: It cannot be used, or is no longer what it was when the run began.
        """
        index = unit.payload["index"]
        spec = context.study.repair.corpus[index]
        prompts, rejects = read_prompts(spec, f"repair.corpus.{index}")
        if source_hash(spec.path) != unit.payload["source"]:
            raise InputError(f"repair.corpus.{index}.path", spec.path, "changed while the study ran", "run it again")
        write_json(context.part(unit), {"prompts": prompts, "rejects": rejects})
        return {"rows": len(prompts), "rejects": len(rejects)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the sets and leave out what the study evaluates."""
        prompts: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        for unit in self.plan(context, None):
            part = read_json(context.part(unit))
            prompts += part["prompts"]
            rejects += part["rejects"]
        evaluated = read_parquet(context.layout.root / "prompts.parquet").to_pylist()
        settings = context.study.repair.select
        found = contaminated(prompts, evaluated, settings.decontaminate, context.study.seed)
        why = {
            index: (CONTAMINATED, f"{similarity:.2f} similar to {other_set}/{other}, which the study evaluates")
            for index, (other_set, other, similarity) in found.items()
        }
        if settings.shared_groups == "leave-out":
            groups = {prompt["group"] for prompt in evaluated}
            for index, prompt in enumerate(prompts):
                if index not in why and prompt["group"] in groups:
                    why[index] = (SHARED, "asks for what a prompt of the study asks for, by its group")
        rejects += [self._left_out(prompts[index], *why[index]) for index in sorted(why)]
        kept = [prompt for index, prompt in enumerate(prompts) if index not in why]
        if not kept:
            reasons = f"all {len(prompts)} requests are evaluated too ({len(found)} by their words, the rest by group)"
            remedy = "give other requests, or set repair.select.shared_groups to keep"
            raise InputError("repair.corpus", f"{len(prompts)} requests", reasons, remedy)
        for row, prompt in enumerate(kept):
            prompt["row"] = row
        out, out_rejects = self.outputs(context.layout, None)
        write_parquet(out, pa.Table.from_pylist(kept, schema=tables.PROMPTS))
        write_parquet(out_rejects, pa.Table.from_pylist(rejects, schema=tables.REJECTS))
        return {"prompts": len(kept), "rejects": len(rejects), CONTAMINATED: len(found), SHARED: len(why) - len(found)}

    def _left_out(self, prompt: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
        return {
            "stage": self.name,
            "set": prompt["set"],
            "source": f"{prompt['set']}/{prompt['id']}",
            "source_row": None,
            "id": prompt["id"],
            "reason": reason,
            "detail": detail,
        }
