"""`structvit convert`: weights from and to PyTorch, or to another model."""

from __future__ import annotations

from typing import Any

import click

from structvit_jax.cli.options import Command


@click.command(cls=Command)
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION")
@click.option("--model", metavar="NAME", help="Model to convert to. Default: the model of SOURCE.")
@click.option("--data", metavar="NAME", help="Data set that released weights were trained on.")
@click.option(
    "--head_width",
    type=click.Choice([32, 64]),
    help="Channels per attention head, if weights with both were released.",
)
@click.option(
    "--weights",
    type=click.Choice(["raw", "ema"]),
    help="Weights to convert if SOURCE holds both: raw, or their moving average.",
)
@click.option("--labels", metavar="FILE", help="Class names, one per line, in the order of the head.")
@click.option(
    "--inflate",
    type=click.Choice(["average", "centre"]),
    default="average",
    help="How to spread image kernels over time.",
)
@click.option(
    "--noise",
    type=float,
    default=0.1,
    metavar="STD",
    help="Standard deviation of the noise that makes equal structure kernels differ.",
)
def command(**arguments: Any) -> None:
    """Convert weights from and to PyTorch, or to another model.

    SOURCE is a run or checkpoint, or a .pth (needs the extra `torch`) or .safetensors file of a UniFormer or
    StructViT. DESTINATION is a new folder, which becomes a checkpoint, or a new .pth or .safetensors file,
    which holds the weights under PyTorch's names, the model, the class names and the normalisation.

    --model=structvit_s_4_1 turns a UniFormer-S into a StructViT-S that computes the same function;
    --model=uniformer_s_video inflates it to a model for videos. Give --data, --head_width or --weights if an
    error message asks for it.

    \b
    Example:
      structvit convert uniformer_small_k400_16x8.pth structvit --model=structvit_s_4_1_video
      structvit convert runs/moving_digits weights.safetensors
    """
    from structvit_jax.convert.conversion import convert

    convert(**arguments)
