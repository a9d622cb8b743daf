"""The `structvit` command.

Each subcommand is a module of this package with a function `command`. It is imported when it is called, so
that `structvit --help` takes a fraction of a second.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from structvit_jax.runtime import process
from structvit_jax.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean

COMMANDS = {
    "train": "Train a configuration, or resume its run.",
    "evaluate": "Evaluate a checkpoint.",
    "predict": "Run a trained model on files and folders.",
    "explain": "Show what a model's attention reads in an image or a video.",
    "report": "Compare runs on one HTML page.",
    "export": "Export a trained model as a program that runs without this package.",
    "convert": "Convert weights from and to PyTorch, or to another model.",
    "prepare": "Prepare and check data sets.",
    "show": "Describe a configuration, or draw a batch of its data.",
    "plan": "Estimate memory, traffic and step time before training.",
    "bench": "Measure the speed of a model or of reading data.",
    "ablate": "Train and compare a grid of models and seeds.",
    "check": "Compare fast kernels with their definitions on this machine.",
}


class _Commands(click.Group):
    """The subcommands; only the one that is called is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"structvit_jax.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UserError(f"unknown command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        from structvit_jax import __version__

        click.echo(f"structvit_jax {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Print the version and exit.")  # fmt: skip
def structvit() -> None:
    """StructViT in JAX: train, evaluate, use and explain vision transformers for images and video.

    \b
    Example:
      structvit train --config=moving_digits
      structvit predict runs/moving_digits CLIP.mp4

    `structvit COMMAND --help` describes a command.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the `structvit` command and exit.

    Exit codes: 0 success, 1 unreadable data or a bug, 2 a user's error, 75 re-run to resume, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "_STRUCTVIT_COMPLETE" in os.environ:  # set by the shell, see the README
        structvit.main(prog_name="structvit")
    run(structvit, arguments, name="structvit", trains=arguments[:1] == ["train"])


def run(command: click.Command, arguments: Sequence[str], *, name: str, trains: bool) -> NoReturn:
    """Run a command line and exit; an expected failure is one line on stderr.

    Args:
      name: of the program, for its help.
      trains: whether it trains, and a signal saves its run.
    """
    process.prepare(trains=trains)
    try:
        with process.exit_in_one_line():
            sys.exit(call(command, arguments, name))
    except SystemExit as end:
        if not isinstance(end.__cause__, UserError):
            raise
        sys.stdout.flush()
        os._exit(end.__cause__.exit_code)  # without waiting for the threads of saves that failed


def call(command: click.Command, arguments: Sequence[str], name: str = "structvit") -> int:
    """Run a command line in this process and return its exit code.

    Raises:
      UserError: also for words that the command does not take.
    """
    try:
        with command.make_context(name, list(arguments)) as context:
            code = command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USER_ERROR
    except click.ClickException as error:
        raise UserError(_message(error)) from error
    return code if isinstance(code, int) else 0


def _message(error: click.ClickException) -> str:
    """Return the message of click's exception as one line with the way out."""
    text = " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return text
    return f"{text} See {context.command_path} --help"
