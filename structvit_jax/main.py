"""Train or evaluate a configuration, like `structvit train` and `structvit evaluate`.

    python -m structvit_jax.main --config=configs/moving_digits.py [--mode=train|eval] [--workdir=DIR]
        [--config.section.key=value ...]

After an interruption, re-run the command to resume. `structvit --help` lists all other commands.
"""

from __future__ import annotations

import sys

import click

from structvit_jax import cli
from structvit_jax.cli import train
from structvit_jax.cli.options import SETTINGS, ConfigArguments, ConfigCommand


@click.command(cls=ConfigCommand, context_settings=SETTINGS)
@click.option(
    "--mode", type=click.Choice(["train", "eval"]), default="train", help="Train, or evaluate the workdir."
)
@train.profile_option
def command(arguments: ConfigArguments, mode: str, profile: str | None) -> None:
    """Train a configuration, resume its run, or evaluate it.

    \b
    Example:
      python -m structvit_jax.main --config=configs/moving_digits.py
    """
    if mode == "train":
        train.train(arguments, profile)
    else:
        train.evaluate(arguments)


def main() -> None:
    """Run the command and exit, see `structvit_jax.cli.run`."""
    cli.run(command, sys.argv[1:], name="python -m structvit_jax.main", trains=True)


if __name__ == "__main__":
    main()
