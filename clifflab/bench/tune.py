"""``clifflab bench tune``: the training loop against a plain loop of PEFT and PyTorch, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from clifflab.bench.geometries import PREFIX, random_model
from clifflab.bench.records import Record, UnequalResultsError, timed
from clifflab.config import ModelSpec, TuneConfig
from clifflab.errors import InputError
from clifflab.models.loading import LoadedModel, load
from clifflab.tuning.batches import epoch_steps
from clifflab.tuning.examples import Example
from clifflab.tuning.group import Alone
from clifflab.tuning.job import prepare, trainable
from clifflab.tuning.loop import Data, learning_rate, train

_PLANTED = "organism:planted"
_MOST = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}  # losses of a step, in nats


@dataclass(frozen=True)
class TuneBench:
    """What to run.

    Attributes:
        model: ``geometry:NAME`` (random weights, random tokens) or ``organism:planted`` (its own language).
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        examples: Examples of one run, one epoch.
        tokens: Longest example; random ones have from half as many tokens to all, of which a quarter is the prompt.
        batch_size: Examples of one optimizer step, all in one forward pass.
        repeats: Timed rounds.
        seed: Of tokens, weights and order.
    """

    model: str = PREFIX + "smollm2-135m"
    dtype: str = "auto"
    examples: int = 16
    tokens: int = 256
    batch_size: int = 4
    repeats: int = 5
    seed: int = 0


def bench_tune(settings: TuneBench, note: Callable[[str], None]) -> list[Record]:
    """Train an adapter twice in turns from the same weights, over the same batches, and compare every step's loss.

    Args:
        settings: What to run.
        note: Told of the progress.

    Raises:
        InputError: No such model, or examples that do not fit it.
        UnequalResultsError: A step's loss is not the plain loop's.
    """
    loaded, examples = _load(settings)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    recipe = TuneConfig(
        epochs=1, batch_size=settings.batch_size, micro_tokens=1 << 30, validation=0.0, checkpointing="off"
    )
    data = Data(examples, [], loaded.pad_id)
    tokens = sum(len(example.ids) for example in examples)
    note(f"{len(examples)} examples, {tokens} tokens, {recipe.batch_size} examples a step")
    losses: dict[str, list[list[float]]] = {"plain": [], "tune": []}
    with trainable(loaded, recipe, settings.seed) as peft:
        start = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.requires_grad}

        def run(name: str) -> None:
            with torch.no_grad():
                for key, parameter in loaded.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(start[key])
            if name == "plain":
                losses[name].append(plain_loop(peft, examples, recipe, settings.seed))
            else:
                progress = train(loaded.model, data, recipe, settings.seed, Alone())
                losses[name].append([entry["loss"] for entry in progress.curve])

        ways = {name: partial(run, name) for name in losses}
        for way in ways.values():
            way()
        times = timed(ways, settings.repeats, loaded.device, note)
    reference = np.array(losses["plain"][0])
    found = {name: float(np.abs(np.array(rows) - reference).max()) for name, rows in losses.items()}
    for name, difference in found.items():
        if not difference <= _MOST[dtype]:
            problem = f"bench tune: a step's loss of {name} differs from plain by {difference:.2g}"
            raise UnequalResultsError(f"{problem}, more than {_MOST[dtype]:g}")
    return [
        Record(
            bench="tune",
            model=settings.model,
            dtype=dtype,
            method=name,
            tokens=round(tokens / len(examples)),
            repeats=settings.repeats,
            seconds_median=time.median,
            tokens_per_second=tokens / time.median,
            ratio_to_plain=times["plain"].median / time.median,
            max_abs_diff=found[name],
            peak_memory_bytes=time.peak,
        )
        for name, time in times.items()
    ]


def plain_loop(peft: Any, examples: Sequence[Example], recipe: TuneConfig, seed: int) -> list[float]:
    """The loop that one would write by hand: padded batches with labels, the model's own loss, AdamW.

    Returns:
        The loss of each step.
    """
    device = next(peft.parameters()).device
    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.peak, weight_decay=recipe.weight_decay)
    steps = epoch_steps([len(e.ids) for e in examples], recipe.batch_size, seed, 0, grouped=True)
    losses = []
    for number, indices in enumerate(steps):
        rows = [examples[index] for index in indices]
        width = max(len(example.ids) for example in rows)
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for b, example in enumerate(rows):
            count = len(example.ids)
            tokens[b, :count] = torch.tensor(example.ids)
            labels[b, example.start : count] = tokens[b, example.start : count]
            mask[b, :count] = 1
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and peft.dtype != torch.float32):
            output = peft(input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(steps), recipe)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses


def _load(settings: TuneBench) -> tuple[LoadedModel, list[Example]]:
    if settings.model == _PLANTED:
        from clifflab.organism.corpus import corpus_rows

        loaded = load(ModelSpec(name="bench", path=_PLANTED, dtype=settings.dtype))  # type: ignore[arg-type]
        rows = [
            {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
            for row in corpus_rows(settings.examples, settings.seed)
        ]
        return loaded, prepare(loaded, rows, TuneConfig(), settings.seed).encoded.examples
    if not settings.model.startswith(PREFIX):
        raise InputError("--model", settings.model, "no such model here", f"give {PREFIX}NAME or {_PLANTED}")
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    loaded = random_model(settings.model, dtype, settings.seed)
    if settings.tokens > loaded.context:
        remedy = f"give at most {loaded.context}"
        raise InputError("--tokens", settings.tokens, f"the model reads {loaded.context} tokens", remedy)
    rng = np.random.default_rng(settings.seed)
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    lengths = rng.integers(settings.tokens // 2, settings.tokens + 1, settings.examples)
    rows_ids = [tuple(rng.integers(1, vocabulary, length).tolist()) for length in lengths]
    return loaded, [Example(f"{i:04d}", f"{i:04d}", ids, len(ids) // 4) for i, ids in enumerate(rows_ids)]
