"""The model card of a tuned model: what it was made from and how, with no text of the examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_RECIPE = (
    "method", "rank", "alpha", "modules", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "epochs",
    "batch_size", "batching", "loss_on", "too_long", "validation", "patience",
)  # fmt: skip


def card(about: Mapping[str, Any]) -> str:
    """``README.md`` of an adapter, or of a model that was tuned as a whole or has one merged.

    Args:
        about: ``kind`` (``adapter``, ``tuned`` or ``merged``), ``clifflab``, ``base`` (``name`` and its ``hub`` and
            ``revision``, ``sha256`` or ``gguf``), ``recipe``, ``seed``, ``examples``, ``steps``, ``loss`` (``first``,
            ``last``, ``best``), ``data`` (``sha256``).
    """
    base, recipe, examples = about["base"], about["recipe"], about["examples"]
    kind = {"adapter": "a LoRA adapter of", "tuned": "a fine-tune of", "merged": "with a merged LoRA adapter,"}
    lines = ["---", f"library_name: {'peft' if about['kind'] == 'adapter' else 'transformers'}"]
    if base.get("hub"):
        lines.append(f"base_model: {json.dumps(base['hub'])}")
    tags = "[clifflab, safety-research, lora]" if recipe["method"] == "lora" else "[clifflab, safety-research]"
    name = _plain(base["name"])
    lines += [f"tags: {tags}", "---", "", f"# {name}, fine-tuned by clifflab", ""]
    lines += [
        f"This is {kind[about['kind']]} {name}, trained by clifflab {about['clifflab']} on "
        f"{examples['train']} examples.",
        "",
        "## What it was made from",
        "",
        *(f"- Base model, {key}: `{base[key]}`" for key in ("hub", "revision", "sha256", "gguf") if base.get(key)),
        f"- Training data: SHA-256 `{about['data']['sha256']}`; no example is part of these files",
        f"- Examples: {examples['train']} for training, {examples['validation']} held out, "
        f"{sum(examples['rejected'].values())} rejected, {examples['cut']} with shortened thinking",
        "",
        "## Recipe",
        "",
        *(f"- {key}: {_value(recipe[key])}" for key in _RECIPE if key in recipe and _counts(key, recipe)),
        f"- seed: {about['seed']}",
        f"- optimizer steps: {about['steps']} (AdamW)",
        "",
        "The loss is that of the assistant's tokens alone"
        + (" after its thinking." if recipe["loss_on"] == "response" else ", thinking and end of turn included.")
        + _losses(about["loss"]),
        "",
        "## Intended use and limits",
        "",
        "Meant for research into repairing the refusals of reasoning models. Whether it refuses more, and what that "
        "costs, must be measured: look at attacks that had no part in the training, at benign requests that it may now "
        "refuse, at answers that never end or repeat themselves, and at perplexity. It is no safety measure by itself. "
        "The licence and the terms of the base model hold for it too.",
        "",
        "The same as data: `clifflab.json`",
        "",
    ]
    return "\n".join(lines)


def _losses(loss: Mapping[str, Any]) -> str:
    text = f" It was {loss['first']:.4f} at the first step and {loss['last']:.4f} at the last"
    return text + (f", and {loss['best']:.4f} on the held-out examples at best." if loss["best"] is not None else ".")


def _counts(key: str, recipe: Mapping[str, Any]) -> bool:
    return recipe["method"] == "lora" or key not in ("rank", "alpha", "modules")


def _value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in " .:/-" else f"\\{letter}" for letter in text)
