"""`structvit evaluate`: evaluate a checkpoint on the data of its run, or on other data."""

from __future__ import annotations

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words


@options.config_command(takes_file=False)
@options.checkpoint
@click.option("--out", metavar="DIR", help="Folder for result.json and predictions.npz; by default none.")
def command(words: Words, checkpoint: str, out: str | None) -> None:
    """Evaluate a checkpoint: RUN/checkpoints/STEP, or RUN for its latest.

    Its card holds the model, the data and how they are read. --config.SECTION.KEY changes any of these, for
    example the folder of the data or the number of views.

    \b
    Example:
      structvit evaluate runs/moving_digits
      structvit evaluate runs/mine --config.data.root=DIR --config.data.test_clips=4 --out=scores
    """
    config = options.open_checkpoint_config(checkpoint, words)
    from structvit_jax import data
    from structvit_jax.training import evaluation
    from structvit_jax.utils.paths import parse_path

    dataset = data.load(config.data, config.augment, config.train.seed)
    evaluation.evaluate_checkpoint(config, parse_path(checkpoint), parse_path(out) if out else None, dataset)
