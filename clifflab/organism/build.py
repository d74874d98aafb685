"""Build the planted-cliff model: train both stages, measure, write a Hugging Face checkpoint with its ground truth."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clifflab.organism.examples import STAGE1_MIX, STAGE2_MIX, Examples
from clifflab.organism.language import COMPLIANCE_WORDS, REFUSAL_WORDS
from clifflab.organism.measure import opening_ids, refusal_by_set, removal_effects
from clifflab.organism.surgery import Head, planted_parameters, remove_heads
from clifflab.organism.tokenizer import build_tokenizer
from clifflab.organism.training import train_stage1, train_stage2

Variant = Literal["planted", "none", "redundant"]

LAYERS, HEADS, HEAD_SIZE = 8, 8, 32
PLANTED_LAYERS = (4, 5, 6)
REDUNDANT_LAYERS = (6, 7)  # one head in each: the later sees what the earlier wrote
FAMILY_STRENGTH = {"wrapped_strong": 1.0, "wrapped_medium": 0.5, "wrapped_weak": 0.15}
STAGE1_STEPS = 600
STAGE2_STEPS = {"planted": 300, "none": 0, "redundant": 450}  # of each training: redundant heads have one each
SILENT_SHARE = 0.8  # of the examples from which the second redundant head learns: the first one does not do its work
SECOND_STATE_WEIGHT = 3.0  # of the state loss of the second redundant head: it is to lose as much as the first does
THREADS = 2  # fixed, because sums depend on it; one is quicker for a model below THREADED_WIDTH
THREADED_WIDTH = 64


def build(
    out: Path,
    *,
    seed: int = 0,
    variant: Variant = "planted",
    strength: float = 1.0,
    width: int = 128,
    log: Callable[[str], None] = print,
    stage1_steps: int = STAGE1_STEPS,
    stage2_steps: int | None = None,
) -> Path:
    """Train the model and write it to a folder.

    Deterministic by its arguments on one machine; neither the global random state nor torch's thread count is changed.

    Args:
        out: Folder to create; may exist if it is empty.
        seed: Chooses the planted heads, the initial weights and the training examples.
        variant: "planted" (two heads that cause the cliff together), "none" (the stage 1 model, no cliff), or
            "redundant" (two heads of which either suffices).
        strength: Share of compliance that stage 2 aims at behind the strong wrapper; the medium and the weak family aim
            at 0.5 and 0.15 of it.
        width: Size of the residual stream, a multiple of 8.
        log: Takes lines of progress.
        stage1_steps: Optimizer steps of stage 1.
        stage2_steps: Optimizer steps of stage 2 (for "redundant" of each head); by default what the variant needs.

    Returns:
        `out`.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If `out` is a file or a folder that is not empty.
    """
    out = Path(out)
    _check(variant, strength, width, stage1_steps, stage2_steps)
    stage2_steps = STAGE2_STEPS[variant] if stage2_steps is None or variant == "none" else stage2_steps
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another one or remove it")
    silent, heads = choose_heads(seed), choose_heads(seed, variant)
    tokenizer = build_tokenizer()
    openings = opening_ids(tokenizer)
    with _isolated(seed, width):
        model = new_model(tokenizer, width)
        examples = Examples(
            tokenizer,
            STAGE1_MIX,
            random.Random(f"stage 1/{seed}"),
            comply={},
            first_weight=4.0,
            thinking_weight=1.0,
            cut_share=0.35,
        )
        train_stage1(model, examples, silent, openings, steps=stage1_steps, log=log)
        if variant == "redundant":
            remove_heads(model, heads)  # they need not be the silent ones, and stage 1 can do without any single head
        digest = stage1_sha256(model, heads)
        truth: dict[str, Any] = {
            "variant": variant,
            "seed": seed,
            "strength": strength,
            "width": width,
            "planted_heads": [] if variant == "none" else [list(head) for head in heads],
            "silent_heads": [list(head) for head in sorted({*silent, *heads})],
            "stage1_steps": stage1_steps,
            "stage2_steps": stage2_steps,
            "refusal_openings": list(REFUSAL_WORDS),
            "compliance_openings": list(COMPLIANCE_WORDS),
            "stage1_p_refuse": refusal_by_set(model, tokenizer),
            "stage1_sha256": digest,
        }
        if variant != "none":
            examples = Examples(
                tokenizer,
                STAGE2_MIX,
                random.Random(f"stage 2/{seed}"),
                comply={name: strength * share for name, share in FAMILY_STRENGTH.items()},
                first_weight=1.0,
                thinking_weight=0.0,
                cut_share=0.25,
            )
            rng = random.Random(f"alone/{seed}")
            train2 = partial(train_stage2, model, examples, openings=openings, rng=rng, steps=stage2_steps, log=log)
            if variant == "planted":
                train2(heads)
            else:
                train2(heads[:1], alone_share=0.0)
                train2(heads[1:], alone_share=SILENT_SHARE, state_weight=SECOND_STATE_WEIGHT, first=heads[:1])
            if stage1_sha256(model, heads) != digest:
                raise AssertionError("stage 2 changed parameters outside the planted heads")
            truth["stage2_p_refuse"] = refusal_by_set(model, tokenizer)
            truth["removed_p_refuse"] = removal_effects(model, tokenizer, heads)
    _write(out, model, tokenizer, truth)
    return out


def _check(variant: str, strength: float, width: int, stage1_steps: int, stage2_steps: int | None) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    if width < 32 or width % 8:
        raise ValueError(f"width must be a multiple of 8 and at least 32, got {width}")
    if stage1_steps < 1 or (stage2_steps is not None and stage2_steps < 1):
        raise ValueError(f"stage1_steps and stage2_steps must be at least 1, got {stage1_steps} and {stage2_steps}")


def choose_heads(seed: int, variant: Variant = "planted") -> list[Head]:
    """The two planted heads of a seed, in two different layers, as (layer, head), both 0-based.

    In stage 1 those of "planted" are silent, whatever the variant.
    """
    rng = random.Random(f"heads/{seed}")
    layers = REDUNDANT_LAYERS if variant == "redundant" else PLANTED_LAYERS
    return [(layer, rng.randrange(HEADS)) for layer in sorted(rng.sample(layers, 2))]


@contextmanager
def _isolated(seed: int, width: int) -> Iterator[None]:
    """Seed torch and fix its threads; restore both afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS if width >= THREADED_WIDTH else 1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def new_model(tokenizer: PreTrainedTokenizerFast, width: int) -> LlamaForCausalLM:
    """An untrained model, from torch's current random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def stage1_sha256(model: LlamaForCausalLM, heads: list[Head]) -> str:
    """Hash of all parameters with the heads' q, k, v and o slices zeroed: equal before and after stage 2."""
    planted = planted_parameters(model, heads)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach()
        if name in planted:
            values = values.masked_fill(planted[name][1], 0.0)
        digest.update(name.encode())
        digest.update(values.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _write(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, truth: dict[str, Any]) -> None:
    """Write the checkpoint beside `out`, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.generation_config.do_sample = True
        model.generation_config.temperature = 1.0
        model.generation_config.top_k = 0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "ground_truth.json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
