"""Evaluates a checkpoint by itself: its card says the model, the data and how they are read.

    python -m structvit_jax.evaluate CHECKPOINT [--out=DIR] [--config.data.root=DIR ...]

CHECKPOINT is RUN/checkpoints/STEP, or RUN for its latest. Any key of the configuration that it was trained
with can be changed, as the place of the data or the number of views. --out gets result.json and
predictions.npz.
"""

from __future__ import annotations

from absl import flags

from structvit_jax import data
from structvit_jax.command import checkpoint_config, run_command
from structvit_jax.paths import parse_path
from structvit_jax.training import loop

_OUT = flags.DEFINE_string("out", None, "Where result.json and predictions.npz go; by default nowhere.")


def main(argv: list[str]) -> None:
    checkpoint, config = checkpoint_config(argv, "CHECKPOINT")
    dataset = data.load(config.data, config.augment, config.train.seed)
    loop.evaluate(config, parse_path(checkpoint), parse_path(_OUT.value) if _OUT.value else None, dataset)


if __name__ == "__main__":
    run_command(main)
