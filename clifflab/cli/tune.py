"""``clifflab tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from clifflab.errors import ConfigError, InputError

if TYPE_CHECKING:
    from clifflab.config import ModelSpec, RuntimeConfig, TuneConfig


class Asked(NamedTuple):
    """What a tuning is: the model, its data, the folder of its results, its settings, and the Ray that works on it."""

    model: ModelSpec
    data: Path
    out: Path
    settings: TuneConfig
    ray: RuntimeConfig


@click.command("tune")
@click.option("--model", required=True, metavar="MODEL", help="A folder, a .gguf file, a hub id or organism:planted.")
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--thinking-format", default="auto", show_default=True, help="How the model marks its thinking.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--data", required=True, metavar="FILE", help="Examples: chat JSONL, or prompt and response columns.")
@click.option("--out", required=True, metavar="DIR", help="Folder to create; the same command goes on there.")
@click.option("--workers", type=click.IntRange(min=1), help="Ray Train workers. [default: one per GPU, or one]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of repair.tune: epochs=3")
@click.option("--runtime", type=click.Choice(["ray", "inline"]), default="ray", show_default=True)
@click.option("--address", metavar="HOST:PORT", help="Use a running Ray (auto: the one on this machine).")
def command(
    model: str,
    revision: str | None,
    thinking_format: str,
    dtype: str,
    data: str,
    out: str,
    workers: int | None,
    seed: int,
    overrides: tuple[str, ...],
    runtime: str,
    address: str | None,
) -> None:
    """Fine-tune a model on examples, by default with a LoRA adapter in PEFT's own format.

    FILE holds a row an example: "messages" that end with the assistant's turn, or a prompt and a "response"; thinking
    stands inline in <think>...</think>, or in a column "thinking". Only what the assistant writes is learnt. After an
    interruption the same command goes on from the last checkpoint, with any number of workers.

    \b
    Exit codes: 0 done; 1 workers died too often; 2 wrong input, or a loss that is no number (one line says which);
    130 interrupted.
    """
    from clifflab.cli.run import check_reach

    asked = prepare(model, revision, thinking_format, dtype, data, out, workers, overrides, runtime, address)
    check_reach(asked.ray, runtime)
    from clifflab.runtime.progress import Terminal
    from clifflab.runtime.tune import fit

    spec, place, settings, ray = asked.model, asked.out, asked.settings, asked.ray
    try:
        figures = fit(spec, str(asked.data), place, settings, seed, runtime=runtime, ray=ray, reporter=Terminal())
    except InputError as error:
        if error.field not in ("thinking_format", "models.path"):
            raise
        option = {"thinking_format": "--thinking-format", "models.path": "--model"}[error.field]
        raise InputError(option, error.value, error.problem, error.remedy) from None
    _show(figures, place)


def prepare(
    model: str, revision: str | None, thinking_format: str, dtype: str, data: str, out: str, workers: int | None,
    overrides: tuple[str, ...], runtime: str, address: str | None,
) -> Asked:  # fmt: skip
    """What the options ask for; reads no file.

    Raises:
        ConfigError: One is wrong, or does not go with another.
    """
    from pydantic import ValidationError

    from clifflab.cli.run import at_address, given_path
    from clifflab.config import ModelSpec, RuntimeConfig, TuneConfig
    from clifflab.studyfile import parse_section

    settings = parse_section(TuneConfig, overrides)
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})
    if runtime == "inline" and settings.workers not in ("auto", 1):
        raise ConfigError("--workers", settings.workers, "go with --runtime ray", "leave one of them out")
    ray = at_address(RuntimeConfig(), address, runtime)
    try:
        spec = ModelSpec(
            name="model", path=model, revision=revision, thinking_format=thinking_format, dtype=dtype,  # type: ignore[arg-type]
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        field = "--" + str(first["loc"][0]).replace("_", "-").replace("path", "model")
        raise ConfigError(field, first["input"], "is not valid", first["msg"].removeprefix("Value error, ")) from None
    return Asked(spec, given_path("--data", data), given_path("--out", out).absolute(), settings, ray)


def _show(figures: dict[str, Any], place: Path) -> None:
    """The closing summary."""
    examples, best, curve = figures["examples"], figures["best"], figures["curve"]
    rejected = sum(examples["rejected"].values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in examples["rejected"].items())
    used = f"{examples['train']} for training, {examples['validation']} held out"
    more = [f"{rejected} rejected ({reasons})"] * bool(rejected) + [f"{examples['cut']} shortened"] * bool(
        examples["cut"]
    )
    click.echo(f"examples  {', '.join([used, *more])}")
    early = ", stopped early" if figures["stopped_early"] else ""
    passed = f"{curve[-1]['epoch']} epoch{'s' if curve[-1]['epoch'] > 1 else ''}"
    click.echo(
        f"steps     {figures['steps']} in {passed}{early}, {figures['tokens']['learnt']:,} tokens learnt in each"
    )
    held = f"; held out {best['loss']:.4f} at best, after epoch {best['epoch']}, which is kept" if best else ""
    click.echo(f"loss      {curve[0]['loss']:.4f} at first, {curve[-1]['loss']:.4f} at last{held}")
    share = figures["parameters"]["trainable"] / figures["parameters"]["all"]
    click.echo(f"trained   {figures['parameters']['trainable']:,} parameters ({share:.2%})")
    click.echo(f"written   {place / 'adapter' if figures['method'] == 'lora' else place / 'model'}")
