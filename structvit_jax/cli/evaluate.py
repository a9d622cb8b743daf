"""`structvit evaluate`: evaluate a checkpoint on the data of its run, or on other data."""

from __future__ import annotations

import click

from structvit_jax.cli.options import CheckpointCommand, ConfigArguments, open_checkpoint_config


@click.command(cls=CheckpointCommand)
@click.option("--out", metavar="DIR", help="Write result.json and predictions.npz to this folder.")
def command(checkpoint: str, arguments: ConfigArguments, out: str | None) -> None:
    """Evaluate a checkpoint.

    CHECKPOINT is RUN/checkpoints/STEP, or RUN for its latest. The model, the test data and the way to read
    them are stored in the checkpoint. --config.SECTION.KEY overrides these, for example the folder of the
    data or the number of views.

    \b
    Example:
      structvit evaluate runs/moving_digits
      structvit evaluate runs/mine --config.data.root=DIR --config.data.test_clips=4 --out=scores
    """
    config = open_checkpoint_config(checkpoint, arguments)
    from structvit_jax import data
    from structvit_jax.training import evaluation
    from structvit_jax.utils.paths import parse_path

    dataset = data.load(config.data, config.augment, config.train.seed)
    evaluation.evaluate_checkpoint(config, parse_path(checkpoint), parse_path(out) if out else None, dataset)
