"""`structvit train`: train a configuration, or resume its run."""

from __future__ import annotations

import os

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words


@options.config_command()
@options.workdir
@click.option(
    "--profile", metavar="START:STOP", default="", help="Write a profile of these steps to WORKDIR/profile."
)
def command(words: Words, workdir: str | None, profile: str) -> None:
    """Train a configuration. The same command resumes a run that was interrupted.

    \b
    Example:
      structvit train --config=moving_digits
      structvit train --config=folder --config.data.root=DIR --workdir=runs/mine
    """
    train(words, workdir, profile)


def train(words: Words, workdir: str | None, profile: str = "") -> None:
    """Train the configuration of a command line in its workdir."""
    from structvit_jax.cli import experiment
    from structvit_jax.runtime import heartbeat, processes

    config = experiment.load(words)
    processes.join(config.mesh.heartbeat, stoppable=True)
    with heartbeat.fail_together(config.mesh.heartbeat):
        opened = experiment.open_data(config, workdir_of(words, workdir))
        found = opened.dataset.survey() if opened.dataset.in_files else None
        if found:
            found.check()
        experiment.select_devices(config)
        for line in (*opened.lines, *(found.lines() if found else ())):
            processes.log(line)
        from structvit_jax.training import loop

        loop.train(opened.config, opened.workdir, opened.dataset, profile=profile)


def evaluate(words: Words, workdir: str | None) -> None:
    """Evaluate the newest checkpoint of a workdir with the configuration of a command line."""
    from structvit_jax.cli import experiment
    from structvit_jax.runtime import heartbeat, processes, signals

    config = experiment.load(words)
    signals.LISTENER.stop()
    processes.join(config.mesh.heartbeat, stoppable=False)
    with heartbeat.fail_together(config.mesh.heartbeat):
        opened = experiment.open_data(config, workdir_of(words, workdir))
        experiment.select_devices(config)
        for line in opened.lines:
            processes.log(line)
        from structvit_jax.training import loop

        loop.evaluate(opened.config, opened.workdir, opened.workdir, opened.dataset)


def workdir_of(words: Words, workdir: str | None) -> str:
    """Return the workdir of a run: the given one, or runs/NAME."""
    return workdir or os.path.join("runs", words.name)
