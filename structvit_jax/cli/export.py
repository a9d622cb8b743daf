"""`structvit export`: a trained model as a program that runs without this package."""

from __future__ import annotations

import click

from structvit_jax.cli.options import CheckpointCommand, ConfigArguments, open_checkpoint_config


@click.command(cls=CheckpointCommand)
@click.argument("path", metavar="OUT.jax")
@click.option(
    "--platforms", default="cpu,cuda,tpu", metavar="LIST", help="Platforms on which the program can run."
)
def command(checkpoint: str, arguments: ConfigArguments, path: str, platforms: str) -> None:
    """Export a trained model as a program that runs without this package.

    Writes two files. OUT.jax holds the program and its weights, serialised by `jax.export`. OUT.jax.json
    describes the inputs, the outputs, the classes and how to run the program. The program needs only JAX and
    flatbuffers, and takes any number of examples. JAX guarantees to run programs that were exported up to six
    months earlier.

    \b
    Example:
      structvit export runs/moving_digits model.jax --platforms=cpu,cuda
      pip install jax flatbuffers   # on the target machine; then in Python:
      program = jax.export.deserialize(open("model.jax", "rb").read())
      logits = program.call(pixels)  # uint8 [batch, [time,] height, width, 3]
    """
    config = open_checkpoint_config(checkpoint, arguments)
    from structvit_jax.inference import stablehlo
    from structvit_jax.inference.trained import load_trained

    stablehlo.check_output(path)
    print(stablehlo.write(load_trained(checkpoint, config), path, platforms.split(",")))
