"""``clifflab score``: every trace of a corpus gets its cliff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.cli.run import at_address, check_reach, given_path
from clifflab.cli.score_options import check_alone, check_apart, check_used, check_workers, named, place_of, roles
from clifflab.errors import ConfigError

if TYPE_CHECKING:
    from clifflab.config import ModelSpec, RuntimeConfig, Study
    from clifflab.scoring.job import Job


def _share(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise click.BadParameter("give a share of the rows above 0 and up to 1, such as 0.01")
    return value


@click.command("score")
@click.option(
    "--model",
    metavar="MODEL",
    help="A folder, a .gguf file, a hub id, organism:planted, or the name of a model in --study.",
)
@click.option(
    "--probes",
    multiple=True,
    metavar="PATH",
    help="A model's folder in a study's results, or its probes.safetensors; repeatable.",
)
@click.option(
    "--input",
    "pattern",
    metavar="GLOB",
    help="Parquet, JSONL (.gz, .zst), CSV, a saved dataset or hf:NAME[:SPLIT]; local, or s3://, gs://, hf://.",
)
@click.option("--output", metavar="DIR", help="Folder of the results; the same command goes on there.")
@click.option("--study", metavar="YAML", help="Take the model, the window and the settings of score: from a study.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="ROLE=NAME",
    help="prompt, messages, thinking, response, id, group or label; repeatable.",
)
@click.option(
    "--name", "set_name", default=None, metavar="SET", help="Name of the set in the tables. [default: corpus]"
)
@click.option(
    "--label",
    type=click.Choice(["harmful", "benign", "unlabelled"]),
    default=None,
    help="Of all rows without a label column. [default: unlabelled]",
)
@click.option(
    "--probe",
    "probe",
    multiple=True,
    metavar="SPEC",
    help="POSITIONS[:ESTIMATOR[:LAYER]]: all, final:difference, all:logistic:every; repeatable. [default: all]",
)
@click.option(
    "--too-long",
    type=click.Choice(["reject", "cut"]),
    help="Traces beyond the limit: reject, or cut the middle of the thinking. [default: reject]",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=16), metavar="N", help="Longest trace. [default: the model's context]"
)
@click.option("--max-rows", type=click.IntRange(min=0), metavar="N", help="Only the first rows.")
@click.option(
    "--sample", type=float, callback=_share, metavar="SHARE", help="Only a share of the rows, drawn by --seed."
)
@click.option("--generate", is_flag=True, help="Rows are bare prompts: let the model think and answer first.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Of --generate. [default: 1024]")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Of --sample and --generate. [default: 0]")
@click.option("--keep-traces", is_flag=True, help="Write the traces too, as clifflab select needs them.")
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="[default: auto]")
@click.option("--thinking-format", help="How the model marks its thinking. [default: auto]")
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Most scoring workers. [default: one per GPU, or core]"
)
@click.option(
    "--min-workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Fewest; the pool grows and shrinks between. [default: --workers]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a worker on a CPU. [default: 1]")
@click.option("--block-rows", type=click.IntRange(min=1), metavar="N", help="Rows of a block. [default: 1000]")
@click.option(
    "--token-budget", type=click.IntRange(min=1), metavar="N", help="Tokens of one forward pass. [default: by device]"
)
@click.option(
    "--object-store",
    "object_store_mb",
    type=click.IntRange(min=80),
    metavar="MB",
    help="Of the Ray that is started. [default: 256]",
)
@click.option(
    "--runtime", type=click.Choice(["ray", "inline"]), default=None, help="Ray Data, or this process. [default: ray]"
)
@click.option("--address", metavar="HOST:PORT", help="Use a running Ray (auto: the one on this machine).")
@click.option("--overwrite", is_flag=True, help="Throw away what another job wrote to --output.")
@click.option(
    "--verify",
    metavar="DIR",
    help="Check finished results instead: counts, ids, checksums, and a sample of rows scored anew the plain way.",
)
@click.option("--rows", "verify_rows", type=click.IntRange(min=1), metavar="N", help="Rows of --verify. [default: 100]")
def command(
    model: str | None, probes: tuple[str, ...], pattern: str | None, output: str | None, study: str | None,
    verify: str | None, verify_rows: int | None, runtime: str | None, address: str | None, overwrite: bool,
    min_workers: int | None, **given: Any,
) -> None:  # fmt: skip
    """Score every trace of a corpus: where its plateau lies and how deep its cliff is.

    Writes scores/*.parquet to DIR (a row a trace and probe, the columns of a study's cliffs.parquet, which clifflab
    select reads), rejects/*.parquet (every other row, with the reason) and manifest.json (counts, checksums,
    fingerprint). After an interruption the same command goes on; a finished job returns at once.

    \b
    Exit codes: 0 done; 1 workers died too often, or --verify found a difference;
    2 wrong input, one line says which; 130 interrupted.
    """
    if verify is not None:
        check_alone(click.get_current_context())
        with named("--verify"):
            _verify(place_of("--verify", verify), verify_rows or 100)
        return
    job, place, settings = prepare(
        model, probes, pattern, output, study, verify_rows, runtime, address, min_workers, **given
    )
    check_reach(settings)
    from clifflab.runtime.score import score
    from clifflab.runtime.score_pool import InlinePool, RayPool
    from clifflab.runtime.score_progress import ScoreProgress

    with named("--output"):
        if settings.kind == "inline":
            found = score(job, place, lambda: InlinePool(settings), ScoreProgress(), overwrite=overwrite)
        else:
            progress = ScoreProgress()
            with RayPool(settings, min_workers, progress.note) as pool:
                found = score(job, place, pool.start, progress, overwrite=overwrite)
    _show(found.manifest, found.root, again=found.again)


def prepare(
    model: str | None, probes: tuple[str, ...], pattern: str | None, output: str | None, study: str | None,
    verify_rows: int | None, runtime: str | None, address: str | None, min_workers: int | None, **given: Any,
) -> tuple[Job, Path, RuntimeConfig]:  # fmt: skip
    """What the options ask for: the job, the folder of its results, and what works on it; reads no file but a study.

    Raises:
        UserError: An option is missing, wrong, or does not go with another.
    """
    for name, value in {"--model": model or study, "--probes": probes, "--input": pattern, "--output": output}.items():
        if not value:
            raise ConfigError(name, "(absent)", "is required", "see clifflab score --help")
    assert pattern is not None
    assert output is not None
    place = place_of("--output", output)
    check_used(verify_rows, given)
    check_apart(pattern, place)
    loaded = _study(study)
    job = _job(loaded, model, probes, pattern, given)
    settings = at_address(_runtime(loaded, runtime, given), address, runtime)
    check_workers(settings, min_workers, given)
    return job, place, settings


def _study(path: str | None) -> Study | None:
    if path is None:
        return None
    from clifflab.cli.run import find_study
    from clifflab.studyfile import load_study

    return load_study(find_study(path))


def _job(study: Study | None, model: str | None, probes: tuple[str, ...], pattern: str, given: dict[str, Any]) -> Job:
    from pydantic import ValidationError

    from clifflab.config import PromptSet, ScoreConfig, TracesConfig
    from clifflab.scoring.job import Job

    def options(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if given[name] not in (None, False, ())}

    settings = study.score if study else ScoreConfig()
    changes = options("too_long", "max_tokens", "block_rows", "token_budget", "keep_traces")
    if given["probe"]:
        changes["probes"] = given["probe"]
    columns = roles(given["columns"])
    traces = study.traces if study else TracesConfig()
    if given["max_new_tokens"]:
        traces = traces.model_copy(update={"max_new_tokens": given["max_new_tokens"]})
    label: Any = given["label"] or "unlabelled"
    seed = given["seed"] if given["seed"] is not None else (study.seed if study else 0)
    try:
        return Job(
            model=_model(study, model, given),
            probes=_probe_files(probes),
            input=pattern,
            rows=PromptSet(
                name=given["set_name"] or "corpus", path=pattern, label=label, columns=columns,
                existing=not given["generate"],
            ),
            settings=ScoreConfig.model_validate({**settings.model_dump(), **changes}),
            window=study.cliff.window if study else (0.5, 0.9),
            generate=traces if given["generate"] else None,
            max_rows=given["max_rows"],
            sample=given["sample"],
            seed=seed,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        names = {"columns": "--column", "path": "--model", "name": "--name", "probes": "--probe"}
        last = str(first["loc"][0]) if first["loc"] else "score"
        field = names.get(last, "--" + last.replace("_", "-"))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(field, first["input"], "is not valid", message) from None


def _model(study: Study | None, model: str | None, given: dict[str, Any]) -> ModelSpec:
    """The study's model of that name (its only one without a name), or a model by its path."""
    from clifflab.config import ModelSpec

    options = {name: given[name] for name in ("revision", "dtype", "thinking_format") if given[name] is not None}
    if study:
        names = [spec.name for spec in study.models]
        if model is None and len(names) > 1:
            raise ConfigError("--model", "(absent)", "the study has several models", f"name one of {', '.join(names)}")
        if model is None or model in names:
            spec = study.models[0] if model is None else study.model(model)
            if spec.repairs:
                remedy = "score with its exported checkpoint"
                raise ConfigError("--model", spec.name, "is made by the study's own repair", remedy)
            return ModelSpec.model_validate({**spec.model_dump(), "before": None, **options})
    assert model is not None
    return ModelSpec.model_validate({"name": "model", "path": model, **options})


def _probe_files(given: tuple[str, ...]) -> tuple[str, ...]:
    """Full paths: workers may have another current folder."""
    paths = [given_path("--probes", path).absolute() for path in given]
    return tuple(str(path / "probes.safetensors" if path.is_dir() else path) for path in paths)


def _runtime(study: Study | None, runtime: str | None, given: dict[str, Any]) -> RuntimeConfig:
    from clifflab.config import RuntimeConfig

    settings = study.runtime if study else RuntimeConfig()
    changes = {name: given[name] for name in ("workers", "threads", "object_store_mb") if given[name]}
    return settings.model_copy(update={**changes, **({"kind": runtime} if runtime else {})})


def _show(manifest: dict[str, Any], place: Path, *, again: bool) -> None:
    """The closing summary."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest["reasons"].items())
    if again:
        click.echo("finished before: nothing to do")
    click.echo(f"read      {manifest['read']:,} rows, {manifest['tokens']:,} tokens scored")
    click.echo(f"scored    {manifest['scored']:,}{_cut(manifest['cut'])}")
    click.echo(f"rejected  {manifest['rejected']:,}{f' ({reasons})' if reasons else ''}")
    click.echo(f"scores    {place / 'scores'}")
    if manifest["rejected"]:
        click.echo(f"rejects   {place / 'rejects'}")
    click.echo(f"manifest  {place / 'manifest.json'}")


def _cut(count: int) -> str:
    return f", {count:,} with the middle of the thinking cut out" if count else ""


def _verify(place: Path, rows: int) -> None:
    import sys

    from clifflab.scoring.verify import verify

    checks = verify(place, rows, lambda line: click.echo(line, err=True))
    for check in checks:
        click.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<10}{check.detail}")
    if not all(check.passed for check in checks):
        sys.exit(1)
