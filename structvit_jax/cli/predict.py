"""`structvit predict`: run a trained model on files and folders."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import Words
from structvit_jax.utils.errors import UserError, printable

if TYPE_CHECKING:
    from structvit_jax.inference.trained import Prediction


@options.config_command(takes_file=False)
@options.checkpoint
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    help="Number of classes to print, the most probable first.",
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
    metavar="SECONDS",
    help="Cut longer videos into parts of this length.",
)
@click.option(
    "--features",
    metavar="DIR",
    help="Also write the features before the head: float32 [views, width] as DIR/FILE.npy.",
)
def command(
    words: Words,
    checkpoint: str,
    paths: tuple[str, ...],
    top: int,
    format_: str,
    every: float,
    features: str | None,
) -> None:
    """Run a trained model on files and folders, and print one line per example.

    Folders are searched recursively for videos or images, whichever the model takes. A folder of frames is
    one video; test:N is example N of the test data of the run. Unreadable files are reported and
    skipped; the command then exits with code 2. --config.SECTION.KEY changes how examples are read, for
    example the number of views.

    \b
    Example:
      structvit predict runs/moving_digits CLIP.mp4 FOLDER test:0 --top=3
    """
    config = options.open_checkpoint_config(checkpoint, words)
    from structvit_jax.inference.trained import load_trained

    trained = load_trained(checkpoint, config)
    count = {True: 0, False: 0}
    predictions = trained.predict(paths, every=every, features=bool(features))
    if features:
        predictions = _saving_features(predictions, features)
    _FORMATS[format_](_counting(predictions, count), top, sys.stdout)
    if count[False]:
        raise UserError(
            f"{count[False]} of {sum(count.values())} could not be read; their lines give the reasons"
        )


def _text(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    for prediction in predictions:
        found = "  ".join(f"{printable(name)} {value:.3f}" for name, value in prediction.best(top))
        print(f"{prediction.id}: {prediction.problem or found}", file=out, flush=True)


def _jsonl(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    for prediction in predictions:
        line: dict[str, Any] = {"path": prediction.id}
        if prediction.problem:
            line["problem"] = prediction.problem
        else:
            best = prediction.best(top)
            line |= {"classes": [name for name, _ in best], "probabilities": [value for _, value in best]}
        print(_json(line), file=out, flush=True)


def _json(value: object) -> str:
    """Return JSON in which only unprintable characters are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _csv(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    """Write one row per class."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "rank", "class", "probability", "problem"])
    for prediction in predictions:
        if prediction.problem:
            writer.writerow([prediction.id, "", "", "", prediction.problem])
        for rank, (name, value) in enumerate([] if prediction.problem else prediction.best(top), 1):
            writer.writerow([prediction.id, rank, printable(name), value, ""])
        out.flush()


_FORMATS: dict[str, Callable[[Iterable[Prediction], int, TextIO], None]] = {
    "text": _text,
    "jsonl": _jsonl,
    "csv": _csv,
}


def _saving_features(predictions: Iterable[Prediction], folder: str) -> Iterator[Prediction]:
    """Write the features of each prediction into `folder`, under its path without parts such as ".."."""
    import numpy as np

    from structvit_jax.runtime.storage import write
    from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

    for prediction in predictions:
        if prediction.features is not None:
            parts = [part for part in prediction.id.split("/") if part not in ("", ".", "..")]
            path = parse_path(os.path.join(folder, *parts) + ".npy")
            file = io.BytesIO()
            np.save(file, prediction.features)
            with write_errors_as_user_error(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, file.getvalue())
        yield prediction


def _counting(predictions: Iterable[Prediction], count: dict[bool, int]) -> Iterator[Prediction]:
    """Count readable (True) and unreadable examples, and print the notes on readable ones."""
    short: list[str] = []
    for prediction in predictions:
        count[not prediction.problem] += 1
        for note in prediction.notes:
            if note.kind == "short":
                short.append(note.reason)
            else:
                print(f"note: {note.id}: {note.reason}", file=sys.stderr)
        yield prediction
    if short:
        clips = "1 clip has" if len(short) == 1 else f"{len(short)} clips have"
        print(f"note: {clips} {short[0]}; frames are repeated", file=sys.stderr)
