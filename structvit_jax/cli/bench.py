"""`structvit bench`: speed of a model, and of reading data."""

from __future__ import annotations

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments


@click.group(cls=options.CommandGroup)
def command() -> None:
    """Measure the speed of a model, or of reading data.

    \b
    Example:
      structvit bench model --config=bench
      structvit bench input --video=CLIP.mp4
    """


@command.command("model", cls=options.ConfigCommand)
@click.option(
    "--only",
    default="",
    show_default=False,
    metavar="PATTERNS",
    help="What to time, as model or 'blocks1.*,*.attend'. Default: everything.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    metavar="N",
    help="Measurements of each part; their median is reported.",
)
@click.option("--peer", type=click.Choice(["torch"]), help="Compare with extras/structvit_torch.py.")
def model(arguments: ConfigArguments, only: str, rounds: int, peer: str | None) -> None:
    """Time the forward pass, the train step and the parts of a model.

    Times are compared with the peak rates of this machine and, with --peer=torch, with PyTorch. The results
    are written to bench.md, bench.json and bench.png in the workdir.

    \b
    Example:
      structvit bench model --config=bench --peer=torch
    """
    from structvit_jax.cli.configuration import load_config
    from structvit_jax.cli.experiment import open_experiment
    from structvit_jax.performance import bench

    opened = open_experiment(load_config(arguments), arguments.workdir)
    bench.run(opened.config, opened.dataset, opened.workdir, only=only, rounds=rounds, peer=peer)


@command.command("input")
@click.option(
    "--video", metavar="FILE", default="", show_default=False, help="A video. Default: generated ones."
)
@click.option(
    "--image", metavar="FILE", default="", show_default=False, help="An image. Default: a generated one."
)
@click.option("--clips", type=click.IntRange(min=1), default=40, metavar="N", help="How many clips to read.")
def input_(video: str, image: str, clips: int) -> None:
    """Time reading clips and images on one core, stage by stage.

    Generated videos have 300 frames of 340x256 pixels (h264, a drifting texture with noise, a key frame every
    30, 60 or 250 frames); the generated image has 500x375 pixels. A clip is 16 frames from a fifth of the
    video, augmented as for Kinetics, 224x224. The plain loop decodes and converts every frame with PyAV and
    then selects. All figures are medians.

    \b
    Example:
      structvit bench input --video=CLIP.mp4
    """
    from structvit_jax.performance import input_speed

    input_speed.run(video, image, clips)
