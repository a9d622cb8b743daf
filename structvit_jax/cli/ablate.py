"""`structvit ablate`: train and compare a grid of models and seeds."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words
from structvit_jax.cli.train import workdir_of


class _Numbers(click.ParamType):
    """Positive numbers, separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            numbers = tuple(float(word) for word in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < 3.4e38 for number in numbers):
            self.fail(f"{value!r} is not a list of positive numbers, as 1e-3,2e-3", param, ctx)
        return numbers


@options.config_command()
@options.workdir
@click.option(
    "--arms",
    multiple=True,
    metavar="'NAME: KEY=VALUE ...'",
    help="An arm and the keys that it changes; repeat it.",
)
@click.option("--against", metavar="NAME", help="Arm that others are compared with; by default the first.")
@click.option(
    "--same_time", metavar="NAME", help="Arm whose time all others get in further runs; by default none."
)
@click.option(
    "--lrs", type=_Numbers(), metavar="LIST", help="Peak learning rates, of which each arm takes its best."
)
@click.option(
    "--tune_seeds", type=click.IntRange(min=1), help="Runs of each learning rate, on validation clips."
)
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each arm, on held-out test clips.")
@click.option(
    "--rounds", type=click.IntRange(min=1), help="Measurements of a step, of which the median counts."
)
def command(words: Words, workdir: str | None, **chosen: Any) -> None:
    """Train a grid of arms and seeds, and test their differences.

    STUDY in the configuration file names the arms and the other options, which the command line changes.
    Each arm takes the learning rate that is best on validation clips, then as many seeds on held-out test
    clips. Writes ablation.md (tables), ablation.json (every run) and ablation.png into the workdir, again
    after every arm. Re-run the command to resume.

    \b
    Example:
      structvit ablate --config=ablate_digits
      structvit ablate --config=digits --arms='D=1: model.structure_dim=1' --arms='D=4: model.structure_dim=4'
    """
    from structvit_jax.cli import experiment
    from structvit_jax.cli.configuration import load_file, override
    from structvit_jax.config import check_config
    from structvit_jax.utils.paths import parse_path

    file = load_file(words.file)
    override(file.config, words.overrides)
    check_config(file.config)
    from structvit_jax.analysis.ablate import Study, study

    given = {key: value for key, value in chosen.items() if value not in (None, ())}
    options_ = Study(**{"arms": (), **file.constants.get("STUDY", {}), **given})
    experiment.select_devices(file.config)
    study.run(file.config, options_, parse_path(workdir_of(words, workdir)), shlex.join(sys.argv[2:]))
