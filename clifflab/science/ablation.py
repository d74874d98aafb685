"""Which heads an ablation removes, and on which prompts (SPEC section 4, ablated model)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clifflab.science.effects import random_sets, top_count

Head = tuple[int, int]
Kind = Literal["none", "suppression", "promoting", "random"]


@dataclass(frozen=True)
class Condition:
    """One way to change the model.

    Attributes:
        fraction: Share of all heads.
        kind: Which heads: none, the top suppression or promoting ones, or random ones.
        draw: Number of the draw of random heads.
    """

    fraction: float
    kind: Kind
    draw: int | None = None


def conditions(fractions: Sequence[float], kinds: Sequence[Kind], draws: int, total: int) -> list[Condition]:
    """All conditions, the unchanged model first.

    Random heads are left out where fewer heads remain beside the suppression heads than have to be drawn.
    """
    found = [Condition(0.0, "none")]
    for fraction in fractions:
        if fraction > 0:
            for kind in kinds:
                if kind != "random":
                    found.append(Condition(fraction, kind))
                elif 2 * top_count(fraction, total) <= total:
                    found += [Condition(fraction, kind, draw) for draw in range(draws)]
    return found


def removed_heads(
    found: Sequence[Condition],
    suppression: Sequence[Head],
    promoting: Sequence[Head],
    heads_per_layer: Sequence[int],
    seed: int,
) -> list[tuple[Head, ...]]:
    """The heads that each condition removes, in the order of the model.

    Args:
        found: The conditions.
        suppression: Heads from the one whose removal raises refusal most.
        promoting: Heads from the one whose removal lowers it most.
        heads_per_layer: Heads of each layer.
        seed: Seed of the study.
    """
    draws = max((condition.draw + 1 for condition in found if condition.draw is not None), default=0)
    sets: list[tuple[Head, ...]] = []
    random: dict[int, list[list[Head]]] = {}
    for condition in found:
        count = top_count(condition.fraction, sum(heads_per_layer))
        if condition.draw is not None:
            if count not in random:
                random[count] = random_sets(suppression[:count], heads_per_layer, draws, seed)
            sets.append(tuple(random[count][condition.draw]))
        else:
            ranked = {"none": [], "promoting": promoting}.get(condition.kind, suppression)
            sets.append(tuple(sorted(ranked[:count])))
    return sets


def ranked_by_hash(seed: int, purpose: str, names: Sequence[str]) -> list[int]:
    """Indices of names in a seeded order that depends on each name alone."""
    order = [hashlib.sha256(f"{purpose}:{seed}:{name}".encode()).hexdigest() for name in names]
    return sorted(range(len(names)), key=lambda i: (order[i], names[i]))


def turn(items: Sequence[int], share: int, draw: int) -> list[int]:
    """The draw's own part of the items: draws take turns, so that all items serve equally often.

    Args:
        items: All of them.
        share: How many one draw gets.
        draw: Number of the draw.
    """
    size = min(share, len(items))
    return [items[(draw * size + i) % len(items)] for i in range(size)]
