"""The model card of a tuned model: what it was made from and how, with no text of the examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_RECIPE = (
    "method", "rank", "alpha", "modules", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "epochs",
    "batch_size", "batching", "loss_on", "too_long", "validation", "patience",
)  # fmt: skip
_WHAT = {"adapter": "a LoRA adapter of {}", "tuned": "a fine-tune of {}", "merged": "{} with a LoRA adapter merged"}
_SOURCE = ("hub", "revision", "sha256", "gguf")


def card(about: Mapping[str, Any]) -> str:
    """``README.md`` of an adapter, or of a model that was tuned as a whole or has one merged.

    Args:
        about: ``kind`` (``adapter``, ``tuned`` or ``merged``), ``clifflab``, and ``base`` or ``source`` (``name`` and
            its ``hub`` and ``revision``, ``sha256`` or ``gguf``); where clifflab did the training also ``recipe``,
            ``seed``, ``examples``, ``steps``, ``loss`` (``first``, ``last``, ``best``) and ``data`` (``sha256``); of a
            merged model ``adapter``, ``dtype`` and ``check``.
    """
    base = about.get("source") or about["base"]
    recipe = about.get("recipe")
    lora = about["kind"] == "merged" or (recipe is not None and recipe["method"] == "lora")
    name = _plain(base["name"])
    lines = ["---", f"library_name: {'peft' if about['kind'] == 'adapter' else 'transformers'}"]
    if base.get("hub"):
        lines.append(f"base_model: {json.dumps(base['hub'])}")
    lines += [f"tags: [clifflab, safety-research{', lora' if lora else ''}]", "---", ""]
    lines += [f"# {name}, fine-tuned", "", f"This is {_WHAT[about['kind']].format(name)}."]
    lines += ["", "## What it was made from", ""]
    lines += [f"- Base model, {key}: `{base[key]}`" for key in _SOURCE if base.get(key)]
    if about["kind"] == "merged":
        lines += [f"- Adapter, sha256: `{about['adapter']['sha256']}`", f"- Weights are stored as {about['dtype']}"]
    lines += _training(about) if recipe else ["- How the adapter was trained is not known"]
    if about["kind"] == "merged":
        check = about["check"]
        lines += [
            "",
            "When it was written, it was loaded again and compared with the base model that has the adapter beside its "
            f"weights, over {check['tokens']} tokens: its logits differ by at most "
            f"{check['largest_difference_of_logits']:.3g}. The adapter itself moved them by up to "
            f"{check['largest_change_of_logits']:.3g}.",
        ]
    lines += [
        "",
        "## Intended use and limits",
        "",
        "Meant for research into repairing the refusals of reasoning models. Whether it refuses more, and what that "
        "costs, must be measured: look at attacks that had no part in the training, at benign requests that it may now "
        "refuse, at answers that never end or repeat themselves, and at perplexity. It is no safety measure by itself. "
        "The licence and the terms of the base model hold for it too.",
        "",
        f"Written by clifflab {about['clifflab']}. The same as data: `clifflab.json`",
        "",
    ]
    return "\n".join(lines)


def _training(about: Mapping[str, Any]) -> list[str]:
    recipe, examples, loss = about["recipe"], about["examples"], about["loss"]
    lora = recipe["method"] == "lora"
    counts = [key for key in _RECIPE if lora or key not in ("rank", "alpha", "modules")]
    best = f", and {loss['best']:.4f} on the held-out examples at best" if loss["best"] is not None else ""
    learnt = "after its thinking" if recipe["loss_on"] == "response" else "thinking and end of turn included"
    return [
        f"- Training data, sha256: `{about['data']['sha256']}`; no example is part of these files",
        f"- Examples: {examples['train']} for training, {examples['validation']} held out, "
        f"{sum(examples['rejected'].values())} rejected, {examples['cut']} with shortened thinking",
        "",
        "## Recipe",
        "",
        *(f"- {key}: {_value(recipe[key])}" for key in counts),
        f"- seed: {about['seed']}",
        f"- optimizer steps: {about['steps']} (AdamW)",
        "",
        f"The loss is that of the assistant's tokens alone, {learnt}. It was {loss['first']:.4f} at the first step and "
        f"{loss['last']:.4f} at the last{best}.",
    ]


def _value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """Text that cannot end its place in the page, nor be read as markup."""
    return "".join(letter if letter.isalnum() or letter in " .:/-" else f"\\{letter}" for letter in text)
