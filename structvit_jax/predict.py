"""What a trained model says of files and folders.

    python -m structvit_jax.predict --checkpoint=RUN FILES or FOLDERS [--top=5] [--format=text|jsonl|csv]
        [--every=SECONDS] [--features=DIR] [--config.data.test_clips=N ...]

One line for each file, in the order given; of a folder all videos (or images) that are in it, a folder of
frames being one video; test:N is example N of the data that the model was tested on. --every cuts longer
videos into parts of so many seconds, a line each. Any key of the configuration that the model was trained
with can be changed, as the number of views.

--features=DIR gets, for each example, what the head sees: float32 [views, width] as DIR/EXAMPLE.npy.

What cannot be read is told, left out, and makes the exit code 2 in the end.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import numpy as np
from absl import flags

from structvit_jax.command import checkpoint_and_paths, run_command
from structvit_jax.errors import UserError, printable
from structvit_jax.paths import parse_path, writing
from structvit_jax.trained import Prediction, load_trained
from structvit_jax.training.storage import write

_TOP = flags.DEFINE_integer("top", 5, "How many classes are told, the most probable first.", lower_bound=1)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "jsonl", "csv"], "Of the lines.")
_EVERY = flags.DEFINE_float("every", 0, "Seconds that longer videos are cut into.", lower_bound=0)
_FEATURES = flags.DEFINE_string("features", None, "Folder for an array of features of each example.")


def _text(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    for prediction in predictions:
        found = "  ".join(f"{printable(name)} {share:.3f}" for name, share in prediction.best(top))
        print(f"{prediction.id}: {prediction.problem or found}", file=out, flush=True)


def _jsonl(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    for prediction in predictions:
        line: dict[str, Any] = {"path": prediction.id}
        if prediction.problem:
            line["problem"] = prediction.problem
        else:
            best = prediction.best(top)
            line |= {"classes": [name for name, _ in best], "probabilities": [share for _, share in best]}
        print(_json(line), file=out, flush=True)


def _json(value: Any) -> str:
    """Return JSON in which unprintable characters are escaped and all others are readable."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _csv(predictions: Iterable[Prediction], top: int, out: TextIO) -> None:
    """A row for each class that is told."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "rank", "class", "probability", "problem"])
    for prediction in predictions:
        if prediction.problem:
            writer.writerow([prediction.id, "", "", "", prediction.problem])
        for rank, (name, share) in enumerate([] if prediction.problem else prediction.best(top), 1):
            writer.writerow([prediction.id, rank, printable(name), share, ""])
        out.flush()


_FORMATS: dict[str, Callable] = {"text": _text, "jsonl": _jsonl, "csv": _csv}


def _saving_features(predictions: Iterable[Prediction], folder: str) -> Iterator[Prediction]:
    """Write the features of each below `folder`, under its path without what would lead out of there."""
    for prediction in predictions:
        if prediction.features is not None:
            parts = [part for part in prediction.id.split("/") if part not in ("", ".", "..")]
            path = parse_path(os.path.join(folder, *parts) + ".npy")
            file = io.BytesIO()
            np.save(file, prediction.features)
            with writing(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, file.getvalue())
        yield prediction


def _counting(predictions: Iterable[Prediction], count: dict[bool, int]) -> Iterator[Prediction]:
    """Count the readable and unreadable ones, and print the notes on the readable."""
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


def main(argv: list[str]) -> None:
    checkpoint, config, paths = checkpoint_and_paths(argv, "FILES or FOLDERS")
    trained = load_trained(checkpoint, config)
    count = {True: 0, False: 0}
    predictions = trained.predict(paths, every=_EVERY.value, features=bool(_FEATURES.value))
    if _FEATURES.value:
        predictions = _saving_features(predictions, _FEATURES.value)
    _FORMATS[_FORMAT.value](_counting(predictions, count), _TOP.value, sys.stdout)
    if count[False]:
        raise UserError(f"{count[False]} of {sum(count.values())} could not be read; the lines say why")


if __name__ == "__main__":
    run_command(main)
