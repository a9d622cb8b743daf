"""The `structvit` command.

Each subcommand is a module of this package that defines `command`. It imports heavy packages when the command
runs, so that `structvit --help` is fast.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
from click.shell_completion import CompletionItem, get_completion_class

from structvit_jax import __version__
from structvit_jax.cli.options import SETTINGS, CommandGroup
from structvit_jax.runtime import process
from structvit_jax.utils.errors import UserError

# Modules of this package, in the order of the help.
COMMANDS = (
    *("train", "evaluate", "predict", "explain", "report", "export", "convert"),
    *("prepare", "show", "plan", "bench", "ablate", "check"),
)
_COMPLETE = "_STRUCTVIT_COMPLETE"  # set by the completion script of a shell


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.version_option(__version__, message="structvit_jax %(version)s", help="Print the version and exit.")
def structvit() -> None:
    """StructViT in JAX: train, evaluate, use and explain vision transformers for images and video.

    \b
    Example:
      structvit train --config=moving_digits
      structvit predict runs/moving_digits CLIP.mp4

    `structvit COMMAND --help` describes a command. To complete commands and options in bash, put this line
    into ~/.bashrc (for zsh or fish, write zsh_source or fish_source):

    \b
      eval "$(_STRUCTVIT_COMPLETE=bash_source structvit)"
    """


for _name in COMMANDS:
    structvit.add_command(importlib.import_module(f"structvit_jax.cli.{_name}").command, _name)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the `structvit` command and exit.

    Exit codes: 0 success, 1 a failed check (of data or kernels) or a bug, 2 an error that the user can fix,
    75 re-run to resume, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if instruction := os.environ.get(_COMPLETE):
        with process.exit_in_one_line():
            sys.exit(_complete(instruction))
    run(structvit, arguments, name="structvit", trains=arguments[:1] == ["train"])


def run(command: click.Command, arguments: Sequence[str], *, name: str, trains: bool) -> NoReturn:
    """Run a command and exit; print an expected failure as one line on stderr.

    Args:
      command: the command.
      arguments: its command line, without the name of the program.
      name: the name of the program in its help.
      trains: whether the command trains; a signal then saves the run.
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
    """Run a command in this process and return its exit code.

    Raises:
      UserError: the command fails, or does not accept its command line.
    """
    try:
        with command.make_context(name, list(arguments)) as context:
            code = command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        raise UserError(_message(error)) from error
    return code if isinstance(code, int) else 0


def _message(error: click.ClickException) -> str:
    """Return the message of an exception of click in one line, with the `--help` command to see."""
    text = " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    if not context:
        return text
    return f"{text}{'' if text.endswith(('.', '?')) else '.'} See {context.command_path} --help"


def _complete(instruction: str) -> int:
    """Answer the completion script of a shell and return the exit code.

    Unlike click's own function, complete file names if there are no other completions, and never print a
    traceback.

    Raises:
      UserError: the request does not come from a completion script.
    """
    shell, _, request = instruction.partition("_")
    shell_class = get_completion_class(shell)
    if not shell_class or request not in ("source", "complete"):
        raise UserError(f"{_COMPLETE}={instruction} is unknown: use bash_source, zsh_source or fish_source")
    completion = shell_class(structvit, {}, "structvit", _COMPLETE)
    if request == "source":
        click.echo(completion.source(), nl=False)
        return 0
    try:
        arguments, incomplete = completion.get_completion_args()
    except (KeyError, ValueError) as error:
        raise UserError(f"{_COMPLETE}={instruction} needs the variables of the completion script") from error
    items: list[CompletionItem] = []
    with contextlib.suppress(UserError):  # the unfinished command line is invalid
        items = completion.get_completions(arguments, incomplete)
    for item in items or [CompletionItem(incomplete, type="file")]:
        click.echo(completion.format_completion(item))
    return 0
