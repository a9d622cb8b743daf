"""`structvit bench`: measure the speed of a model, or of reading data."""

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
    help="Parts to time, such as model or 'blocks1.*,*.attend'. Default: all.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    metavar="N",
    help="Number of measurements of each part; their median is reported.",
)
@click.option(
    "--peer",
    type=click.Choice(["torch"]),
    help="Also time extras/structvit_torch.py.",
)
def model(arguments: ConfigArguments, only: str, rounds: int, peer: str | None) -> None:
    """Time the forward pass, the train step and the parts of a model.

    Times are compared with the peak rates of this machine. With --peer=torch they are also compared with
    PyTorch. The results are written to bench.md, bench.json and bench.png in the workdir.

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
    "--video",
    metavar="FILE",
    default="",
    show_default=False,
    help="Video to read. Default: generated videos.",
)
@click.option(
    "--image",
    metavar="FILE",
    default="",
    show_default=False,
    help="Image to read. Default: a generated one.",
)
@click.option(
    "--clips",
    type=click.IntRange(min=1),
    default=40,
    metavar="N",
    help="Clips to read for each result.",
)
def input_(video: str, image: str, clips: int) -> None:
    """Time reading clips and images on one core, stage by stage.

    Generated videos have 300 frames of 340x256 pixels, encoded as h264 with a key frame every 30, 60 or 250
    frames; they show a drifting texture with noise. The generated image has 500x375 pixels. A clip has 16
    frames of 224x224, spread over a fifth of the video, with the augmentation of Kinetics-400. For
    comparison, the plain loop decodes and converts every frame with PyAV, then selects the frames of the
    clip. All times are medians.

    \b
    Example:
      structvit bench input --video=CLIP.mp4
    """
    from structvit_jax.performance import input_speed

    input_speed.run(video, image, clips)
