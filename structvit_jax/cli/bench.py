"""`structvit bench`: measure the speed of a model, or of reading data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.errors import UserError

if TYPE_CHECKING:
    import ml_collections

    from structvit_jax.data.dataset import ConfiguredDataset
    from structvit_jax.data.reader import Reader

_RECIPES = ("imagenet", "kinetics400", "something_v2", "folder")  # that `bench input` measures by default
_MAX_WORKERS = 1024


@click.group(cls=options.CommandGroup)
def command() -> None:
    """Measure the speed of a model, or of reading data.

    \b
    Example:
      structvit bench model --config=bench
      structvit bench input CLIP.mp4
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


@command.command("input", cls=options.ConfigCommand)
@click.argument("paths", metavar="[FILE]...", nargs=-1)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    metavar="N",
    help="Number of measurements of each result, of half a second or more.",
)
@click.option(
    "--workers",
    metavar="N,...",
    default="",
    show_default=False,
    help="Also time batches from this many worker processes, such as 0,1,2. Default: 1 with --peer.",
)
@click.option(
    "--peer",
    type=click.Choice(["torch"]),
    help="Also time PyTorch on the same files with the same recipe.",
)
def input_(
    arguments: ConfigArguments, paths: tuple[str, ...], rounds: int, workers: str, peer: str | None
) -> None:
    """Time reading training data, stage by stage.

    Without --config, the recipes imagenet, kinetics400, something_v2 and folder are measured. They read FILEs
    (videos, images, and folders of these), or generated files: a video of 300 frames of 340x256 pixels, h264
    with a key frame every 30 frames, that shows a drifting texture with noise; a JPEG of 500x375 pixels; and
    for folder, a PNG of 28x28 pixels. With --config and --config.data.root, the data of a configuration are
    read. Files are read repeatedly, so they come from memory rather than from a disk.

    The stages are: "open", which includes indexing the frames; "decode"; "convert" to RGB; "augment"
    (RandAugment and colour jitter); "crop", which includes resizing; "batch", which copies examples into a
    batch; "transport" of a batch from a worker process to its parent; and "device", the copy to the
    accelerator. Copies of an example in repeated augmentation share opening and decoding; recipes with such
    copies are also measured with one copy. For folder, images that fit in memory are also read from the cache
    of decoded frames, as in every epoch after the first.

    With --peer=torch, a DataLoader of PyTorch decodes with PyAV, torchcodec and decord and augments with
    torchvision and timm, in all combinations that are installed.

    \b
    Example:
      structvit bench input CLIP.mp4 IMAGE.jpg
      structvit bench input --config=folder --config.data.root=DIR --workers=0,1,2
    """
    from structvit_jax.performance import input_speed

    counts = _worker_counts(workers or ("1" if peer else ""))
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in _readers(arguments, paths, Path(folder)):
            input_speed.report(name, reader, rounds=rounds, workers=counts, peer=peer)


def _worker_counts(text: str) -> list[int]:
    """Parse the value of --workers."""
    words = text.split(",") if text else []
    counts = [int(word) if word.isdecimal() and len(word) < 5 else _MAX_WORKERS + 1 for word in words]
    if any(count > _MAX_WORKERS for count in counts):
        raise UserError(f"--workers={text} is not a list of numbers up to {_MAX_WORKERS}, such as 0,1,2")
    return counts


def _readers(
    arguments: ConfigArguments, paths: tuple[str, ...], folder: Path
) -> Iterator[tuple[str, Reader]]:
    """Yield the name and the training split of each recipe to measure.

    Args:
      arguments: of the command line. Without --config, the recipes are `_RECIPES`.
      paths: files to read; if there are none, files are generated.
      folder: an existing folder for generated files and for data sets of files.

    Raises:
      UserError: a configuration or data that cannot be used.
    """
    from structvit_jax.cli.configuration import load_config
    from structvit_jax.performance import input_files

    if not arguments.file and {"data.name", "data.root"} & arguments.overrides.keys():
        raise UserError("to measure data of your own, set the recipe that reads them: --config=folder")
    data_sets = 0
    for recipe in [arguments.file] if arguments.file else _RECIPES:
        config = load_config(arguments._replace(file=recipe))
        if config.data.name != "folder" or config.data.root:
            if paths:
                raise UserError(f"--config={recipe} reads data of its own, so no FILE can be given")
            yield recipe, _open(config, arguments.workdir)
            return
        for video in _kinds(config):
            if paths:
                files = input_files.find(paths, video=video)
            else:
                files = [input_files.generate(folder, video=video, small=recipe == "folder")]
            if not files:
                continue
            root, data_sets = folder / str(data_sets), data_sets + 1
            input_files.write_data_set(root, files)
            own = config.copy_and_resolve_references()
            own.data.root = str(root)
            yield recipe, _open(own, str(folder))
    if not data_sets:
        wanted = f"files that --config={arguments.file} reads" if arguments.file else "videos or images"
        raise UserError(f"there are no {wanted} in {', '.join(paths)}")


def _kinds(config: ml_collections.ConfigDict) -> tuple[bool, ...]:
    """Return whether a configuration reads videos; both values if it adapts to the data."""
    from structvit_jax.config import automatic

    if config.data.frames is None and config.model.name is None:
        return True, False
    filled = config.copy_and_resolve_references()
    automatic.fill_model(filled, lambda: True)
    return (filled.data.frames > 0,)


def _open(config: ml_collections.ConfigDict, workdir: str) -> Reader:
    """Return the reader of the training split, and open the device."""
    from structvit_jax.cli.experiment import open_experiment

    return cast("ConfiguredDataset", open_experiment(config, workdir).dataset).train
