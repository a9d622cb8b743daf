"""`structvit convert`: weights from and to PyTorch, or to another model."""

from __future__ import annotations

import click

from structvit_jax.cli import options


@options.plain_command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DESTINATION")
@click.option(
    "--model", default="", metavar="NAME", help="Model to fit the weights to; by default their own."
)
@click.option("--data", default="", metavar="NAME", help="Data set that released weights were trained on.")
@click.option(
    "--head_width", type=click.Choice(["32", "64"]), help="Width of a head, where the release has both."
)
@click.option("--weights", type=click.Choice(["raw", "ema"]), help="Which weights of a file that holds both.")
@click.option(
    "--labels", default="", metavar="FILE", help="Class names, one a line, in the order of the head."
)
@click.option(
    "--inflate",
    type=click.Choice(["average", "centre"]),
    default="average",
    help="Of image weights over time.",
)
@click.option("--noise", type=float, default=0.1, help="Noise that sets equal structure kernels apart.")
def command(
    source: str,
    destination: str,
    model: str,
    data: str,
    head_width: str | None,
    weights: str | None,
    labels: str,
    inflate: str,
    noise: float,
) -> None:
    """Convert PyTorch weights to a checkpoint, one model's weights to another's, and back to PyTorch's keys.

    SOURCE is a .pth (the extra torch) or .safetensors file of a UniFormer or StructViT, or a run or
    checkpoint. DESTINATION is a new folder, which config.init_from and `structvit evaluate` take, or a .pth
    or .safetensors file, which gets PyTorch's keys, with model, class names and normalisation beside them.
    --model=structvit_s_4_1 makes a StructViT that computes what the UniFormer does; --model=uniformer_s_video
    inflates it. What neither the file nor the shapes of its weights determine has to be given.

    \b
    Example:
      structvit convert uniformer_small_k400_16x8.pth structvit --model=structvit_s_4_1_video
      structvit convert runs/moving_digits weights.safetensors
    """
    from structvit_jax.inference import convert

    convert.run(
        convert.Request(
            source, destination, model, data, int(head_width or 0), weights or "", labels, inflate, noise
        )
    )
