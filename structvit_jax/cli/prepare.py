"""`structvit prepare`: check data sets, and write lists, shards and label maps to train from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.cores import available_cores
from structvit_jax.utils.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
# Data sets whose annotation files structvit_jax.data.annotations reads.
PUBLISHED = {
    "kinetics400": "Prepare Kinetics-400 from its CSV files.",
    "something_v1": "Prepare Something-Something V1 from its CSV files and folders of frames.",
    "something_v2": "Prepare Something-Something V2 from its JSON files.",
    "diving48": "Prepare Diving-48 (V2) from its JSON files.",
    "finegym99": "Prepare FineGym with 99 classes from its lists and its JSON file.",
    "finegym288": "Prepare FineGym with 288 classes from its lists and its JSON file.",
    "imagenet": "Prepare ImageNet-1K from its folders of images and LOC_val_solution.csv.",
}
_SMALLEST_SIDE = 32  # pixels; a smaller value is likely a mistake


@click.group(cls=options.CommandGroup)
def command() -> None:
    """Check data sets, and write lists, shards and label maps to train from.

    --check decodes frames at the beginning, middle and end of every example, in parallel. It prints a table
    of the data set and the command to run next. Unreadable examples are listed with the reasons in
    bad_files.txt in the folder --out; without --out, in bad_files-NAME-HASH.txt in the current folder. The
    exit code is 1 if an example is unreadable, or if the data cannot be trained on.

    --transcode=256 writes copies of videos to the folder `clips` in --out: H.264 with a short side of 256
    pixels and a key frame every 12 frames, which decodes several times faster. The lists in --out refer to
    the copies, with the same labels, and with the same frames in parts of files. Videos that are small
    already and have frequent key frames are not copied, nor are images and damaged files: the lists refer to
    the originals. After an interruption, re-run the command to resume.

    \b
    Example:
      structvit prepare folder DIR --check
      structvit prepare folder DIR --transcode=256 --out=OUT --check
      structvit prepare kinetics400 ANNOTATIONS VIDEOS --out=DIR --check
    """


def _combine(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator that adds several options."""
    return lambda function: functools.reduce(lambda inner, add: add(inner), reversed(decorators), function)


def _reject_nan(ctx: click.Context, option: click.Parameter, value: float) -> float:
    """Reject NaN, which click accepts in any range."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number", ctx, option)
    return value


_images = click.option(
    "--images", is_flag=True, help="Treat the examples as images. Default: the kind of most files decides."
)
_output_options = _combine(
    click.option(
        "--out", default="", show_default=False, metavar="DIR", help="Folder to write lists and reports to."
    ),
    click.option(
        "--transcode",
        type=click.IntRange(min=_SMALLEST_SIDE),
        metavar="SHORT_SIDE",
        help="Copy videos to --out so that they decode fast, with this short side in pixels: 256, say.",
    ),
    click.option("--check", is_flag=True, help="Decode three frames of every example, and print a table."),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        default=available_cores(),
        metavar="N",
        help="Number of processes that decode.",
    ),
)


def _split_options(val_fraction: float) -> Callable[[F], F]:
    """Return a decorator that adds the options of commands that read a folder."""
    return _combine(
        click.option("--train_split", default="train", metavar="NAME", help="Folder or list to train on."),
        click.option("--test_split", default="val", metavar="NAME", help="Folder or list to test on."),
        click.option(
            "--val_fraction",
            type=click.FloatRange(0, 1, max_open=True),
            default=val_fraction,
            metavar="X",
            callback=_reject_nan,
            help="Fraction of the training examples to hold out for testing if there is no test split.",
        ),
        _images,
    )


def _run(source: str, paths: tuple[str, ...], **chosen: Any) -> int:
    from structvit_jax.data import preparation

    return preparation.run(preparation.Request(source, paths, **chosen))


@command.command("folder")
@click.argument("path", metavar="DIR")
@_output_options
@_split_options(0.1)
def folder(path: str, **chosen: Any) -> int:
    """Prepare your own data: class folders, or lists.

    DIR has DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, or DIR/CLASS/FILE alone, or lists such as
    DIR/train.csv and DIR/val.csv.

    \b
    Example:
      structvit prepare folder DIR --check
    """
    return _run("folder", (path,), **chosen)


@command.command("list")
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@_output_options
@_images
def list_(paths: tuple[str, ...], **chosen: Any) -> int:
    """Prepare lists of examples, in CSV, JSON lines, or SlowFast's format.

    The first FILE is the training list. All lists are in the same folder.

    \b
    Example:
      structvit prepare list train.csv val.csv --check
    """
    return _run("list", paths, **chosen)


def _add_published(name: str, description: str) -> None:
    """Add the command of a published data set."""

    def published(annotations: str, media: str | None, **chosen: Any) -> int:
        return _run(name, (annotations, media or annotations), **chosen)

    published.__doc__ = f"""{description}

    ANNOTATIONS and FILES are folders that are searched recursively. Default for FILES: ANNOTATIONS.

    Writes train.jsonl, val.jsonl and labels.txt to the folder --out; to train, set config.data.root to it.
    Annotated files that do not exist are listed in missing-SPLIT.txt in the same folder. The numbers of
    examples are printed beside the published ones.

    \b
    Example:
      structvit prepare {name} ANNOTATIONS FILES --out=DIR --check
    """
    arguments = _combine(
        click.argument("annotations", metavar="ANNOTATIONS"),
        click.argument("media", metavar="[FILES]", required=False),
    )
    command.command(name)(arguments(_output_options(published)))


for _name, _description in PUBLISHED.items():
    _add_published(_name, _description)


@command.command("shards")
@click.argument("root", metavar="DIR")
@click.argument("out", metavar="OUT")
@_split_options(0.0)
@click.option(
    "--shards",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Number of files per split; 0: chosen automatically.",
)
@click.option(
    "--beam_runner",
    default="",
    show_default=False,
    metavar="NAME",
    help="Runner of Apache Beam, such as DirectRunner.",
)
@click.option(
    "--beam_option",
    "beam_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of the Beam pipeline; repeatable.",
)
def shards(root: str, out: str, beam_runner: str, beam_options: tuple[str, ...], **chosen: Any) -> None:
    """Write ArrayRecord shards of encoded clips or images, for clusters.

    DIR is a folder as for `structvit prepare folder`. To train, set config.data.root to OUT. If an example is
    a part of a file, only that part is stored; it is copied without decoding. For an unreadable example the
    reason is stored, so that batches are the same as from DIR. With --beam_runner, records are written in
    parallel; this needs the extra `beam`.

    \b
    Example:
      structvit prepare shards DIR OUT --beam_runner=DirectRunner
    """
    if beam_options and not beam_runner:
        raise UserError("--beam_option needs --beam_runner, such as --beam_runner=DirectRunner")
    from structvit_jax.data import tfds_writer

    tfds_writer.write_folder(root, out, beam_runner=beam_runner, beam_options=beam_options, **chosen)


@command.command("label_maps", cls=options.CheckpointCommand)
@click.argument("folder", metavar="DIR")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    metavar="N",
    help="Number of classes to keep per position.",
)
def label_maps(checkpoint: str, arguments: ConfigArguments, folder: str, top: int) -> None:
    """Write label maps for token labelling.

    A label map has a teacher's scores at each position of a training image. CHECKPOINT is the teacher, and
    DIR is the folder to write the maps to.

    The images are those that the teacher was trained on. For finer maps, set --config.data.size to more than
    the teacher was trained with: a map has one position per 32 x 32 pixels. If the teacher has no dense head,
    its head is applied to every position. To train a student, set config.data.label_maps to DIR. After an
    interruption, re-run the command to resume.

    \b
    Example:
      structvit prepare label_maps runs/teacher maps
      structvit train --config=imagenet:structvit_s_4_1,224_labels --config.data.root=IMAGENET \\
          --config.data.label_maps=maps
    """
    config = options.open_checkpoint_config(checkpoint, arguments)
    from structvit_jax.inference import label_map_writer

    print(label_map_writer.write(config, checkpoint, folder, top))
