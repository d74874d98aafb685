"""``clifflab export``: checkpoints made from results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import ConfigError, InputError

if TYPE_CHECKING:
    from clifflab.config import ModelSpec
    from clifflab.models.heads import Head
    from clifflab.stages.finished import FinishedRun


@click.group("export")
def command() -> None:
    """Write a checkpoint that any engine serves."""


@command.command("ablated")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--checkpoint", metavar="MODEL", help="A folder, a hub id or organism:planted in place of RUN.")
@click.option("--revision", help="Commit, tag or branch of a hub id given as --checkpoint.")
@click.option("--model", metavar="NAME", help="Which model of RUN. [default: its only one]")
@click.option("--fraction", type=float, help="Share of all heads: the top of RUN's ranking. [default: the study's]")
@click.option("--heads", metavar="L.H,...", help="Heads as layer.head, in place of a fraction: 4.2,6.2")
@click.option("--gamma", type=float, help="Factor of the heads' output; 0 removes them. [default: the study's, else 0]")
@click.option("--out", required=True, metavar="DIR", help="Folder to create.")
def ablated(
    run: str | None,
    checkpoint: str | None,
    revision: str | None,
    model: str | None,
    fraction: float | None,
    heads: str | None,
    gamma: float | None,
    out: str,
) -> None:
    """Write a model with heads scaled in the attention's output projection, and its model card.

    Heads come from the ranking of RUN, the folder of a finished study, or from --heads. The checkpoint is compared
    with the hooked model before DIR gets its name.

    \b
    Exit codes: 0 done; 2 wrong input, one line says which.
    """
    if (run is None) == (checkpoint is None):
        raise ConfigError("export", run or "", "needs either RUN or --checkpoint", "give one of them")
    if checkpoint is not None and (model is not None or fraction is not None):
        given = "--model" if model is not None else "--fraction"
        raise ConfigError(given, model or fraction, "goes with a RUN", "give --checkpoint and --heads alone")
    if revision is not None and checkpoint is None:
        raise ConfigError("--revision", revision, "goes with --checkpoint", "leave it out")
    if heads is not None and fraction is not None:
        raise ConfigError("--fraction", fraction, "and --heads both choose the heads", "give one of them")
    if heads is None and checkpoint is not None:
        raise ConfigError("--heads", "(absent)", "is needed with --checkpoint", "give layer.head, e.g. 4.2,6.2")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError("--fraction", fraction, "is no share of the heads", "give more than 0 and at most 1")
    if gamma is not None and not 0 <= gamma < 1:
        raise ConfigError("--gamma", gamma, "is out of range", "give at least 0, which removes, and less than 1")
    named = None if heads is None else _parsed(heads)
    from clifflab.models.export import check_out

    place = Path(out).expanduser().absolute()
    check_out(place)
    about = _export(_source(run, model), checkpoint, revision, named, fraction, gamma, place)
    check = about["check"]
    click.echo(f"heads    {', '.join(about['heads'])} of {about['heads_total']}, gamma {about['gamma']:g}")
    click.echo(f"checked  logits differ from the hooked model by at most {check['largest_difference_of_logits']:.3g}")
    click.echo(f"written  {place}")


@command.command("merged")
@click.option("--model", required=True, metavar="MODEL", help="The base model: a folder, a hub id or organism:planted.")
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--adapter", required=True, metavar="DIR", help="A LoRA adapter in PEFT's format, or what tune wrote.")
@click.option("--out", required=True, metavar="DIR", help="Folder to create.")
def merged(model: str, revision: str | None, adapter: str, out: str) -> None:
    """Write a model with an adapter added to its weights, and its model card.

    The checkpoint is compared with the model that has the adapter beside its weights before DIR gets its name.

    \b
    Exit codes: 0 done; 2 wrong input, one line says which.
    """
    from clifflab.models.export import check_out
    from clifflab.tuning.merge import export_merged

    place = Path(out).expanduser().absolute()
    check_out(place)
    spec = _spec(model, revision, "--model")
    about = export_merged(spec, Path(adapter).expanduser().absolute(), place, _identity(spec))
    check = about["check"]
    click.echo(f"merged   {about['layers']} layers' weights, stored as {about['dtype']}")
    click.echo(f"checked  logits differ from the adapted model by at most {check['largest_difference_of_logits']:.3g}")
    click.echo(f"written  {place}")


def _parsed(text: str) -> list[Head]:
    from clifflab.config.heads import parse_head

    try:
        return sorted({parse_head(name) for name in text.split(",")})
    except ValueError as error:
        raise ConfigError("--heads", text, "is no list of heads", str(error)) from None


def _source(run: str | None, model: str | None) -> FinishedRun | None:
    from clifflab.stages.finished import FinishedRun

    return None if run is None else FinishedRun.open(Path(run).expanduser().absolute(), model)


def _export(
    run: FinishedRun | None,
    checkpoint: str | None,
    revision: str | None,
    named: list[Head] | None,
    fraction: float | None,
    gamma: float | None,
    out: Path,
) -> dict[str, Any]:
    from clifflab import __version__
    from clifflab.models.export import export_ablated
    from clifflab.models.intervene import Intervention
    from clifflab.report.card import card_files

    if run:
        spec, settings = run.spec, run.study.ablation
        gamma = settings.gamma if gamma is None else gamma
        fraction = None if named else fraction or run.study.heads.fraction
        chosen = named if fraction is None else run.top(fraction)
        intervention = Intervention(gamma, None, settings.renormalise)
    else:
        spec, chosen, intervention = _spec(checkpoint or "", revision), named, Intervention(gamma or 0.0)
    assert chosen is not None
    told: dict[str, Any] = {}

    def describe(written: dict[str, Any]) -> dict[str, str]:
        told.update(
            kind="ablated",
            clifflab=__version__,
            source=_identity(spec),
            heads=[f"{layer}.{head}" for layer, head in sorted(chosen)],
            gamma=intervention.gamma,
            fraction=fraction,
            **written,
            run=run.provenance() if run else None,
            measured=run.measured(chosen, intervention.gamma) if run else None,
        )
        return card_files(told)

    export_ablated(spec, chosen, intervention, out, describe)
    return told


def _spec(path: str, revision: str | None, option: str = "--checkpoint") -> ModelSpec:
    from clifflab.config import ModelSpec
    from clifflab.models.loading import resolve_spec

    if not path.strip():
        raise InputError(option, path, "is empty", "give a checkpoint folder, a hub id or organism:planted")
    return resolve_spec(ModelSpec(name="model", path=path, revision=revision))


def _identity(spec: ModelSpec) -> dict[str, Any]:
    """What the source is: its name, and its bytes or the hub's commit; no path of this machine."""
    from clifflab.artifacts import file_hash
    from clifflab.models.loading import model_identity

    identity = model_identity(spec, file_hash)
    local = Path(spec.path).expanduser()
    keys = ("hub", "revision", "sha256", "gguf", "adapter")
    return {"name": local.name if local.exists() else spec.path, **{k: identity[k] for k in keys if k in identity}}
