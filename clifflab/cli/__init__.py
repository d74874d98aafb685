"""The command line: parses, calls, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys

import click

from clifflab import __version__
from clifflab.errors import ClifflabError


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, or when the help needs their one line.

    The short helps are kept here, so that ``--help`` imports nothing.
    """

    commands_of = {
        "run": ("clifflab.cli.run", "Run a study: prompts, traces, probes, cliffs, report."),
        "submit": ("clifflab.cli.submit", "Send a study, a scoring or a tuning to a cluster."),
        "status": ("clifflab.cli.status", "Where a run stands: models, steps, units, speed, time left."),
        "logs": ("clifflab.cli.jobs:logs", "Show what a submitted job prints."),
        "stop": ("clifflab.cli.jobs:stop", "Stop a submitted job; submitted again, it continues."),
        "ls": ("clifflab.cli.jobs:ls", "List the jobs of a cluster."),
        "score": ("clifflab.cli.score", "Score every trace of a corpus of any size, exactly once."),
        "select": ("clifflab.cli.select", "Choose the examples of a repair from scored traces."),
        "tune": ("clifflab.cli.tune", "Fine-tune a model on chosen examples, on one or more workers."),
        "evaluate": ("clifflab.cli.evaluate", "A model before and after tuning, prompt by prompt."),
        "judge": ("clifflab.cli.judge", "Measure a judge against labelled responses."),
        "compare": ("clifflab.cli.compare", "Does a second run lie within the intervals of the first?"),
        "organism": ("clifflab.cli.organism", "The planted-cliff model: build it, write its prompts and traces."),
        "model": ("clifflab.cli.model", "Look at a model: geometry, thinking format, closing tokens, checks."),
        "bench": ("clifflab.cli.bench", "Time the fast ways against the plain one; results must be equal."),
        "export": (
            "clifflab.cli.export",
            "Write a checkpoint that any engine serves: with heads removed, or an adapter merged.",
        ),
        "doctor": ("clifflab.cli.doctor", "Check this machine: Python, packages, GPUs, Ray, disk, models."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs."""
        return list(self.commands_of)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        import importlib

        if cmd_name not in self.commands_of:
            return None
        module, _, name = self.commands_of[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name or "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.commands_of.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="clifflab")
def cli() -> None:
    """Find, explain and repair the refusal cliff of reasoning models."""


def main() -> None:
    """Entry point: a user's mistake is one line and its exit code; a bug keeps its traceback."""
    try:
        cli(standalone_mode=False)
    except ClifflabError as error:
        click.echo(f"clifflab: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("clifflab: stopped; the same command continues", err=True)
        sys.exit(130)
