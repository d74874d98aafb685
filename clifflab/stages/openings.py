"""The model's own opening words: first tokens of its refusals and compliances, and the lens that weighs them."""

from __future__ import annotations

from clifflab.models.lens import Lens, make_lens
from clifflab.science.controls import opening_tokens
from clifflab.stages.base import Context
from clifflab.stages.duplicates import group_splits, held_out_sets


def opening_ids(context: Context, model: str) -> tuple[list[int], list[int]]:
    """First tokens of the refusals and of the compliances of training groups."""
    folder = context.layout.folder(model)
    files = [folder / name for name in ("traces.parquet", "outcomes.parquet")]

    def count() -> tuple[list[int], list[int]]:
        splits, held_out = group_splits(context), held_out_sets(context.study)
        columns = ["token_ids", "response_start", "set", "group"]
        traces = context.table(files[0]).select(columns).to_pylist()
        first: dict[str, list[int]] = {"refused": [], "complied": []}
        for trace, outcome in zip(traces, context.table(files[1])["outcome"].to_pylist(), strict=True):
            if outcome in first and splits[trace["group"]] == "train" and trace["set"] not in held_out:
                first[outcome].append(trace["token_ids"][trace["response_start"]])
        return opening_tokens(first["refused"], first["complied"])

    return context.once(f"openings:{model}", files, count)


def opening_lens(context: Context, model: str) -> Lens | None:
    """The lens of the model's own opening words; ``None`` where one kind is missing or its last step is no lens."""
    folder = context.layout.folder(model)
    files = [folder / name for name in ("traces.parquet", "outcomes.parquet")]
    openings = opening_ids(context, model)
    return context.once(f"lens:{model}", files, lambda: make_lens(context.loaded(model), *openings))
