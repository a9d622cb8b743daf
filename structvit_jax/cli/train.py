"""`structvit train`: train a configuration, or resume its run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words

if TYPE_CHECKING:
    from structvit_jax.cli.experiment import Opened


@options.config_command()
@options.workdir
@click.option(
    "--profile", metavar="START:STOP", default="", help="Write a profile of these steps to WORKDIR/profile."
)
def command(words: Words, workdir: str | None, profile: str) -> None:
    """Train a configuration. After an interruption, re-run the command to resume.

    \b
    Example:
      structvit train --config=moving_digits
      structvit train --config=folder --config.data.root=DIR --workdir=runs/mine
    """
    train(words, workdir, profile)


def train(words: Words, workdir: str | None, profile: str = "") -> None:
    """Train the configuration of a command line in its workdir."""
    with _experiment(words, workdir, stoppable=True) as opened:
        from structvit_jax.training import loop

        loop.train(opened.config, opened.workdir, opened.dataset, profile=profile)


def evaluate(words: Words, workdir: str | None) -> None:
    """Evaluate the newest checkpoint of a workdir with the configuration of a command line."""
    with _experiment(words, workdir, stoppable=False) as opened:
        from structvit_jax.training import evaluation

        evaluation.evaluate_checkpoint(opened.config, opened.workdir, opened.workdir, opened.dataset)


@contextlib.contextmanager
def _experiment(words: Words, workdir: str | None, *, stoppable: bool) -> Iterator[Opened]:
    """Connect the processes of a run, open its data, and select its devices.

    Args:
      words: of the command line.
      workdir: as given.
      stoppable: whether signals stop a training, whose data are surveyed first.
    """
    from structvit_jax.cli import experiment
    from structvit_jax.runtime import heartbeat, processes, signals

    config = experiment.load(words)
    if not stoppable:
        signals.LISTENER.stop()
    processes.join(config.mesh.heartbeat, stoppable=stoppable)
    with heartbeat.fail_together(config.mesh.heartbeat):
        opened = experiment.open_data(config, workdir_of(words, workdir))
        lines = opened.lines
        if stoppable and opened.dataset.in_files:
            survey = opened.dataset.survey()
            survey.check()
            lines = [*lines, *survey.lines()]
        experiment.select_devices(config)
        for line in lines:
            processes.log(line)
        yield opened


def workdir_of(words: Words, workdir: str | None) -> str:
    """Return the workdir of a run: the given one, or runs/NAME."""
    return workdir or os.path.join("runs", words.name)
