"""`structvit convert`: weights from and to PyTorch, or to another model."""

from __future__ import annotations

from typing import Any

import click

from structvit_jax.cli import options


@options.plain_command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION")
@click.option("--model", metavar="NAME", help="Model to fit the weights to; by default their own.")
@click.option("--data", metavar="NAME", help="Data set that released weights were trained on.")
@click.option("--head_width", type=click.Choice([32, 64]), help="Width of a head, if both were released.")
@click.option("--weights", type=click.Choice(["raw", "ema"]), help="Raw or averaged, if a file holds both.")
@click.option("--labels", metavar="FILE", help="Class names, one per line, in the order of the head.")
@click.option("--inflate", type=click.Choice(["average", "centre"]), default="average",
              help="How image weights are spread over time.")  # fmt: skip
@click.option("--noise", type=float, default=0.1, help="Deviation that sets equal structure kernels apart.")
def command(**arguments: Any) -> None:
    """Convert PyTorch weights to a checkpoint, one model's weights to another's, or a checkpoint to PyTorch.

    SOURCE is a .pth (needs the extra `torch`) or .safetensors file of a UniFormer or StructViT, or a run or
    checkpoint. DESTINATION is a new folder, for config.init_from and `structvit evaluate`, or a .pth or
    .safetensors file with PyTorch's keys and a description of model, class names and normalisation.

    --model=structvit_s_4_1 makes a StructViT that computes what the UniFormer does, and
    --model=uniformer_s_video inflates it. Give --data, --head_width or --weights if an error asks for it.

    \b
    Example:
      structvit convert uniformer_small_k400_16x8.pth structvit --model=structvit_s_4_1_video
      structvit convert runs/moving_digits weights.safetensors
    """
    from structvit_jax.convert.conversion import convert

    convert(**arguments)
