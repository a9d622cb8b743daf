"""`structvit explain`: show what a model's attention reads in an image or a video."""

from __future__ import annotations

from typing import Any

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments


def _split(ctx: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    return value.split(",") if value else None


@click.command(cls=options.CheckpointCommand)
@click.argument("path", metavar="FILE")
@click.option("--query", metavar="T,Y,X", callback=_split, help="Query: frame, row and column of the input.")
@click.option("--layer", metavar="NAME", help="Attention block to draw, such as blocks3.0.")
@click.option("--head", type=click.IntRange(min=0), metavar="N", help="Attention head to draw.")
@click.option("--smooth/--nosmooth", default=True, help="Interpolate maps between positions.")
@click.option("--animate", type=click.Choice(["gif", "mp4"]), help="Also animate the maps of a video.")
@click.option(
    "--beside", metavar="RUN,RUN", callback=_split, help="Other runs whose models are also shown on the page."
)
@click.option("--out", default=".", metavar="DIR", help="Folder for the files.")
def command(checkpoint: str, arguments: ConfigArguments, path: str, **selection: Any) -> None:
    """Show what a model's attention reads in an image or a video.

    Writes two files. explained.png shows the maps of one query (a position of the input) in one layer and
    head: its correlations with all positions, the attention of each of the D structure kernels beside the
    kernels themselves, and the final map, which is the weight of each value. explained.html is a
    self-contained page on which any query, layer and head can be selected. It also shows the models of the
    runs in --beside.

    FILE is an image, a video, a folder of frames, or test:N for example N of the run's test data.

    --query is a frame and a pixel of the model's input, counted from 0; for an image it is Y,X. By default,
    the layer, head and query with the highest score are selected. The score is the product of two factors.
    The first is (effective rank - 1) / (D - 1), or 1 if D < 2; the effective rank, from 1 to D, measures how
    many different dynamic kernels the query uses. The second is 4 h (1 - h), where h is the entropy of the
    attention divided by its maximum, log(D x number of keys); this factor is 0 if the attention is uniform or
    at a single key. Candidates are all heads of the layers whose frames have at least 3 x 3 positions, and up
    to 6 of the most textured positions of the middle frame.

    \b
    Example:
      structvit explain runs/moving_digits test:3 --out=explained --animate=gif
    """
    config = options.open_checkpoint_config(checkpoint, arguments)
    from structvit_jax.analysis.explain.explanation import explain

    explain(checkpoint, config, path, **selection)
