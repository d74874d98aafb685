"""How the heads behind the cliff are found and removed."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from clifflab.config.base import Section


def parse_head(name: str) -> tuple[int, int]:
    """A head as ``(layer, head)`` from ``layer.head``."""
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", name.strip())
    if not found:
        raise ValueError(f"{name!r} is no head: write layer.head, counted from 0, as in 4.2")
    return int(found[1]), int(found[2])


class HeadsConfig(Section):
    """The search for refusal suppression heads (SPEC section 4).

    Attributes:
        method: ``exact`` sweeps every head; ``direct`` and ``attribution`` only estimate, from one forward pass (and
            one backward pass); ``screen-then-exact`` estimates all by attribution and sweeps the ``screen`` best
            exactly. The estimates are made beside an exact sweep too, with their rank correlation.
        positions: Where a head is changed: at the ``closing`` tokens, at ``all`` tokens, or one sweep of each. The
            first one ranks.
        traces: Attacked traces that are swept, of each half of the groups; 0 leaves heads and ablation out.
        controls: Plain refused and benign answered traces that are swept, of the half that effects are reported on;
            the benign ones of the other half give the ``mean`` outputs.
        gamma: Factor of a changed head's output; 0 removes it.
        replace: ``scale`` by gamma, or put the ``mean`` over benign answered traces in its place.
        renormalise: Keep the norm of each token's head outputs.
        attacked: Sets of attacked prompts; by default all harmful traces that complied.
        plain: Sets of plain harmful prompts; by default all harmful traces that were refused.
        fraction: Share of heads that counts as the top.
        screen: Share of heads that ``screen-then-exact`` sweeps exactly.
        threshold: Least effect of a suppression head, as a share of the gap between plain and attacked prompts.
        random_draws: Draws of random heads with the same counts per layer.
        random_directions: Random directions beside the probe's.
        candidates: Top heads whose joint removal is searched, greedily and in pairs.
        batch_size: Traces of one unit of work.
        layer_block: Layers of one unit of work; 0 takes all layers at once.
        budget_mb: Memory for the activations of one batch; 0 is an eighth of a GPU, or 512.
        only: Heads to look at as ``layer.head``; all by default. Fractions count all heads of the model.
    """

    method: Literal["direct", "attribution", "exact", "screen-then-exact"] = "exact"
    positions: tuple[Literal["closing", "all"], ...] = ("closing", "all")
    traces: int = Field(default=32, ge=0)
    controls: int = Field(default=16, ge=2)
    gamma: float = Field(default=0.0, ge=0.0, lt=1.0)
    replace: Literal["scale", "mean"] = "scale"
    renormalise: bool = False
    attacked: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    fraction: float = Field(default=0.03, gt=0.0, le=1.0)
    screen: float = Field(default=0.1, gt=0.0, le=1.0)
    threshold: float = Field(default=0.05, ge=0.0)
    random_draws: int = Field(default=20, ge=20)
    random_directions: int = Field(default=20, ge=0)
    candidates: int = Field(default=8, ge=2, le=64)
    batch_size: int = Field(default=8, ge=1)
    layer_block: int = Field(default=0, ge=0)
    budget_mb: int = Field(default=0, ge=0)
    only: tuple[str, ...] = ()

    @field_validator("positions")
    @classmethod
    def _some_positions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give closing, all, or both once")
        return value

    @field_validator("only")
    @classmethod
    def _heads(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parse_head(name)
        return value


class AblationConfig(Section):
    """Generation with heads removed (SPEC section 4, ablated model).

    Attributes:
        fractions: Shares of all heads that are removed; 0 is the unchanged model and always part of it.
        kinds: Which heads: the top ``suppression`` heads, the top refusal-``promoting`` ones, ``random`` ones.
        thinking: ``regenerated`` by the ablated model, or held ``fixed`` as the unchanged model wrote it.
        gamma: Factor of the chosen heads' output.
        renormalise: Keep the norm of each token's head outputs.
        sets: Sets of prompts that are answered anew; all by default.
        traces: Prompts of each set; 0 leaves the experiment out.
        random_draws: Draws of random heads, with the counts per layer of the suppression heads.
        perplexity_traces: Benign answered traces of which the perplexity is measured.
    """

    fractions: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1)
    kinds: tuple[Literal["suppression", "promoting", "random"], ...] = ("suppression", "promoting", "random")
    thinking: tuple[Literal["regenerated", "fixed"], ...] = ("regenerated", "fixed")
    gamma: float = Field(default=0.0, ge=0.0, lt=1.0)
    renormalise: bool = False
    sets: tuple[str, ...] = ()
    traces: int = Field(default=32, ge=0)
    random_draws: int = Field(default=20, ge=1)
    perplexity_traces: int = Field(default=32, ge=2)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.0 <= share <= 1.0 for share in value) or list(value) != sorted({0.0, *value}):
            raise ValueError("give ascending shares of heads from 0 to 1, the first one 0")
        return value
