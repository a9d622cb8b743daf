"""`structvit export`: a trained model as a program that runs without this package."""

from __future__ import annotations

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words


@options.config_command(takes_file=False)
@options.checkpoint
@click.argument("path", metavar="OUT.jax")
@click.option("--platforms", default="cpu,cuda,tpu", metavar="LIST", help="Platforms to run on.")
def command(words: Words, checkpoint: str, path: str, platforms: str) -> None:
    """Export a trained model as a program that runs wherever JAX does, without this package.

    Writes OUT.jax, a program serialised by `jax.export` with the weights inside, and OUT.jax.json, which
    describes its inputs, outputs, classes and how to run it. The program takes any number of examples. JAX
    guarantees to run programs exported by versions up to six months older.

    \b
    Example:
      structvit export runs/moving_digits model.jax --platforms=cpu,cuda
      pip install jax flatbuffers   # on the target machine; then in Python:
      program = jax.export.deserialize(open("model.jax", "rb").read())
      logits = program.call(pixels)  # uint8 [batch, [time,] height, width, 3]
    """
    config = options.open_checkpoint_config(checkpoint, words)
    from structvit_jax.inference import stablehlo
    from structvit_jax.inference.trained import load_trained

    stablehlo.check_output(path)
    print(stablehlo.write(load_trained(checkpoint, config), path, platforms.split(",")))
