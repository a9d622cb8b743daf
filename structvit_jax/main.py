"""Train or evaluate a configuration: `structvit train` under the name that scripts know.

    python -m structvit_jax.main --config=configs/moving_digits.py [--mode=train|eval] [--workdir=DIR]
        [--config.section.key=value ...]

The same command resumes a run that was interrupted. All other commands are those of `structvit`.
"""

from __future__ import annotations

import sys

import click

from structvit_jax import cli
from structvit_jax.cli import options
from structvit_jax.cli.options import Words


@options.config_command()
@click.option(
    "--mode", type=click.Choice(["train", "eval"]), default="train", help="Train, or evaluate the workdir."
)
@options.workdir
@click.option(
    "--profile", metavar="START:STOP", default="", help="Write a profile of these steps to WORKDIR/profile."
)
def command(words: Words, mode: str, workdir: str | None, profile: str) -> None:
    """Train a configuration, resume its run, or evaluate it.

    \b
    Example:
      python -m structvit_jax.main --config=configs/moving_digits.py
    """
    from structvit_jax.cli import train

    if mode == "train":
        train.train(words, workdir, profile)
    else:
        train.evaluate(words, workdir)


def main() -> None:
    cli.run(command, sys.argv[1:], name="python -m structvit_jax.main", trains=True)


if __name__ == "__main__":
    main()
