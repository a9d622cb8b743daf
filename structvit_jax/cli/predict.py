"""`structvit predict`: run a trained model on files and folders."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from structvit_jax.cli.options import CheckpointCommand, ConfigArguments, open_checkpoint_config
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import printable

if TYPE_CHECKING:
    from structvit_jax.inference.trained import Prediction


@click.command(cls=CheckpointCommand)
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    metavar="N",
    help="Number of most probable classes to print.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "jsonl", "csv"]),
    default="text",
    help="Format of the output.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=False,
    metavar="SECONDS",
    help="Cut longer videos into parts of this length. Default: whole videos.",
)
@click.option(
    "--features",
    metavar="DIR",
    help="Also write the features before the head to DIR/FILE.npy, float32 [views, width].",
)
def command(
    checkpoint: str,
    arguments: ConfigArguments,
    paths: tuple[str, ...],
    top: int,
    format_: str,
    every: float,
    features: str | None,
) -> None:
    """Run a trained model on files and folders.

    Prints one line per example. FILE is an image or a video, depending on the model. It can also be a folder
    of frames, which is one video; another folder, which is searched recursively; or test:N for example N of
    the test data of the run. Unreadable files are reported and skipped; the exit code is then 2. Set
    --config.SECTION.KEY to change how examples are read, for example the number of views.

    \b
    Example:
      structvit predict runs/moving_digits CLIP.mp4 FOLDER test:0 --top=3
    """
    config = open_checkpoint_config(checkpoint, arguments)
    from structvit_jax.inference.trained import load_trained

    predictions = load_trained(checkpoint, config).predict(paths, every=every, features=features is not None)
    if format_ == "csv":
        print(_CSV_HEADER)
    total, unreadable = _print(predictions, _FORMATS[format_], top, features)
    if unreadable:
        raise UserError(f"{unreadable} of {total} could not be read; their lines give the reasons")


def _print(
    predictions: Iterable[Prediction],
    as_text: Callable[[Prediction, int], str],
    top: int,
    features: str | None,
) -> tuple[int, int]:
    """Print predictions and their notes; return the number of examples and how many are unreadable.

    Args:
      predictions: printed as they arrive.
      as_text: one of _FORMATS.
      top: number of classes to print.
      features: folder to write features to; None writes none.
    """
    total, unreadable, short = 0, 0, list[str]()
    for prediction in predictions:
        total += 1
        unreadable += bool(prediction.problem)
        for note in prediction.notes:
            if note.kind == "short":
                short.append(note.reason)
            else:
                print(f"note: {note.id}: {note.reason}", file=sys.stderr)
        if features is not None:
            _save_features(prediction, features)
        print(as_text(prediction, top), flush=True)
    if short:
        clips = "1 clip has" if len(short) == 1 else f"{len(short)} clips have"
        print(f"note: {clips} {short[0]}; frames are repeated", file=sys.stderr)
    return total, unreadable


def _text(prediction: Prediction, top: int) -> str:
    classes = "  ".join(f"{printable(name)} {probability:.3f}" for name, probability in prediction.best(top))
    return f"{prediction.id}: {prediction.problem or classes}"


def _jsonl(prediction: Prediction, top: int) -> str:
    line: dict[str, Any] = {"path": prediction.id}
    if prediction.problem:
        line["problem"] = prediction.problem
    else:
        names, probabilities = zip(*prediction.best(top), strict=True)
        line |= {"classes": names, "probabilities": probabilities}
    text = json.dumps(line, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


_CSV_HEADER = "path,rank,class,probability,problem"


def _csv(prediction: Prediction, top: int) -> str:
    """Return one row per class."""
    rows: list[tuple[object, ...]] = [(prediction.id, "", "", "", prediction.problem)]
    if not prediction.problem:
        best = enumerate(prediction.best(top), 1)
        rows = [(prediction.id, rank, printable(name), value, "") for rank, (name, value) in best]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().removesuffix("\n")


_FORMATS: dict[str, Callable[[Prediction, int], str]] = {"text": _text, "jsonl": _jsonl, "csv": _csv}


def _save_features(prediction: Prediction, folder: str) -> None:
    """Write the features of an example into `folder`, under its path without parts such as ".."."""
    import numpy as np

    from structvit_jax.runtime.storage import write
    from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

    if prediction.features is None:
        return
    parts = [part for part in prediction.id.split("/") if part not in ("", ".", "..")]
    path = parse_path(os.path.join(folder, *parts) + ".npy")
    file = io.BytesIO()
    np.save(file, prediction.features)
    with write_errors_as_user_error(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, file.getvalue())
