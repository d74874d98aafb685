"""Which examples each optimizer step sees, and how a step's examples are shared out.

The plan of steps depends on the examples, the settings and the seed alone; workers and micro-batches only divide a
step's sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clifflab.errors import InputError

_POOL = 8  # steps whose examples are sorted by length together


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps of one pass over the examples."""
    return -(-examples // batch_size)


def epoch_steps(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, *, grouped: bool) -> list[list[int]]:
    """The examples of each step of one epoch: every example exactly once.

    Steps differ in size by one example at most, so that the last one is no smaller than the others.

    Args:
        lengths: Tokens of each example.
        batch_size: Most examples of a step.
        seed: Of the order.
        epoch: Which pass; each has an order of its own.
        grouped: Put examples of similar length into a step: within pools of eight steps drawn at random, examples are
            sorted by length, and the steps are shuffled again.
    """
    count = steps_per_epoch(len(lengths), batch_size)
    rng = np.random.default_rng([seed, 2, epoch])
    order = rng.permutation(len(lengths))
    steps = [part.tolist() for part in np.array_split(order, count)]
    if grouped:
        for first in range(0, count, _POOL):
            pool = sorted(
                (index for step in steps[first : first + _POOL] for index in step), key=lambda i: (lengths[i], i)
            )
            for place in range(first, min(first + _POOL, count)):
                size = len(steps[place])
                steps[place], pool = pool[:size], pool[size:]
        steps = [steps[place] for place in rng.permutation(count)]
    return steps


def check_workers(examples: int, batch_size: int, workers: int) -> None:
    """Refuse more workers than the smallest step has examples.

    Raises:
        InputError: Some worker would have nothing to do.
    """
    smallest = examples // steps_per_epoch(examples, batch_size)
    if smallest < workers:
        problem = f"an optimizer step has {smallest} of the {examples} examples, and every worker needs one"
        raise InputError("tune.workers", workers, problem, "take fewer workers, or a larger tune.batch_size")


def share_out(indices: Sequence[int], lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Divide a step's examples over workers, evenly by tokens: the longest first, each to whom has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    tokens = [0] * workers
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        least = min(range(workers), key=lambda w: (tokens[w], len(shares[w]), w))
        shares[least].append(index)
        tokens[least] += lengths[index]
    return shares


def micro_batches(indices: Sequence[int], lengths: Sequence[int], most_tokens: int, *, packed: bool) -> list[list[int]]:
    """Divide one worker's examples of a step into forward passes.

    Args:
        indices: The examples.
        lengths: Tokens of every example of the data.
        most_tokens: Most tokens of a pass, padding included; a longer example passes alone.
        packed: Examples are joined without padding; otherwise each takes the width of the longest beside it.
    """
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        last = batches[-1] if batches else None
        if last is not None:
            size = sum(lengths[i] for i in last) if packed else lengths[last[0]] * len(last)
            if size + (lengths[index] if packed else lengths[last[0]]) <= most_tokens:
                last.append(index)
                continue
        batches.append([index])
    return batches
