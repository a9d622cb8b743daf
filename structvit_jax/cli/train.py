"""`structvit train`: train a configuration, or resume its run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from structvit_jax.cli.options import ConfigArguments, ConfigCommand

if TYPE_CHECKING:
    from structvit_jax.cli.experiment import Experiment

profile_option = click.option(
    "--profile", metavar="START:STOP", help="Profile these steps and write the trace to WORKDIR/profile."
)


@click.command(cls=ConfigCommand)
@profile_option
def command(arguments: ConfigArguments, profile: str | None) -> None:
    """Train a configuration, or resume its run.

    Writes config.json, metrics.jsonl, TensorBoard logs and checkpoints to the workdir. The evaluation at the
    end writes result.json. After an interruption, re-run the command to resume.

    \b
    Example:
      structvit train --config=moving_digits
      structvit train --config=folder --config.data.root=DIR --workdir=runs/mine
    """
    train(arguments, profile)


def train(arguments: ConfigArguments, profile: str | None) -> None:
    """Train the configuration of a command line in its workdir."""
    with _experiment(arguments, training=True) as opened:
        from structvit_jax.training import loop

        loop.train(opened.config, opened.workdir, opened.dataset, profile=profile or "")


def evaluate(arguments: ConfigArguments) -> None:
    """Evaluate the newest checkpoint of a workdir with the configuration of a command line."""
    with _experiment(arguments, training=False) as opened:
        from structvit_jax.training import evaluation

        evaluation.evaluate_checkpoint(opened.config, opened.workdir, opened.workdir, opened.dataset)


@contextlib.contextmanager
def _experiment(arguments: ConfigArguments, *, training: bool) -> Iterator[Experiment]:
    """Connect the processes of a run and open its experiment.

    Args:
      arguments: the configuration options of the command line.
      training: survey the data first, and save the run before a signal stops it.
    """
    from structvit_jax.cli import configuration, experiment
    from structvit_jax.runtime import heartbeat, processes, signals

    config = configuration.load_config(arguments)
    if not training:
        signals.LISTENER.stop()
    processes.join(config.mesh.heartbeat, stoppable=training)
    with heartbeat.fail_together(config.mesh.heartbeat):
        yield experiment.open_experiment(config, arguments.workdir, survey=training)
