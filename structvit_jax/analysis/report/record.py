"""What a run left in its workdir, however far it came."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from structvit_jax.analysis.report.predictions import Predictions, read_predictions
from structvit_jax.config import model_arguments
from structvit_jax.models import create_model
from structvit_jax.models.weights import split
from structvit_jax.runtime import goodput
from structvit_jax.runtime.storage import CONFIG, METRICS, PREDICTIONS, RESULT, read_json
from structvit_jax.training.card import from_card
from structvit_jax.training.restore import newest_card
from structvit_jax.utils.errors import UserError, parse_json
from structvit_jax.utils.paths import absolute, parse_path

Line = dict[str, Any]  # of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Record:
    """Files of a run, read; empty, or None, where they are not there yet."""

    workdir: epath.Path
    name: str  # tells it from the others of a report
    config: ml_collections.ConfigDict
    lines: tuple[Line, ...]  # of steps and evaluations, in their order
    result: dict[str, Any]
    predictions: Predictions | None
    seconds: dict[str, float]  # by activity, see `structvit_jax.runtime.goodput`

    @property
    def step(self) -> int:
        """The last one that it has told."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def unit(self) -> str:
        return "clips" if self.config.data.frames else "images"

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and the values that they have of a metric, as loss or eval_top1."""
        found = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        return steps, values

    @property
    def rate(self) -> float | None:
        """Examples a second, over all the time in steps and in waiting for input."""
        spent = self.seconds.get("step", 0) + self.seconds.get("input", 0)
        return self.step * self.config.data.batch_size / spent if spent else None

    @functools.cached_property
    def parameters(self) -> int | None:
        """Of its model; None where nothing tells its classes yet, or its model is none that we have."""
        names = (newest_card(self.workdir) or {}).get("class_names")
        if self.predictions:
            names = self.predictions.class_names
        if names is None:
            return None
        try:
            model = create_model(**model_arguments(self.config), num_classes=len(names), seed=None)
        except UserError:
            return None
        return sum(array.size for array in split(model)[1].params.values())

    def missing(self) -> list[str]:
        """What is not there, and what the page lacks for it, a sentence each."""
        scored = self.result.get("step", self.step)
        outdated = bool(self.lines) and scored != self.step
        found = (
            (not self.lines, f"Not trained yet: there is no {METRICS}, so there are no curves."),
            (not self.result, f"Not evaluated yet: there is no {RESULT}, so there are no scores."),
            (
                not self.predictions,
                f"There is no {PREDICTIONS}, so nothing is known of single examples.",
            ),
            (not self.seconds, f"There is no {goodput.FILE}, so nothing is known of the time."),
            (outdated, f"Its scores are of step {scored}; it is now at step {self.step}."),
        )
        return [sentence for lacking, sentence in found if lacking]


def read_records(words: Sequence[str]) -> list[Record]:
    """Reads workdirs.

    Raises:
      UserError: one that holds no run, or a file that is damaged.
      OSError: one cannot be read.
    """
    workdirs = [absolute(parse_path(word)) for word in dict.fromkeys(words)]
    last = [path.name for path in workdirs]
    names = [p.name if last.count(p.name) == 1 else str(p) for p in workdirs]
    return [_read_record(path, name) for path, name in zip(workdirs, names, strict=True)]


def _read_record(workdir: epath.Path, name: str) -> Record:
    if not workdir.is_dir():
        raise UserError(f"no folder at {workdir}: it should be the --workdir of a run")
    if not (workdir / CONFIG).exists():
        raise UserError(
            f"{workdir} holds no run: there is no {CONFIG}, which python -m structvit_jax.main writes into"
            " its --workdir when it starts training"
        )
    config = from_card(_read_object(workdir / CONFIG), workdir / CONFIG, any_model=True)
    lines, result = _read_lines(workdir / METRICS), _read_object(workdir / RESULT)
    path = workdir / PREDICTIONS
    found = read_predictions(path) if path.exists() else None
    return Record(workdir, name, config, lines, result, found, goodput.seconds_of(workdir))


def _read_object(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.exists():
        return {}
    if (found := read_json(path)) is None:
        raise UserError(f"{path} is damaged: it holds no JSON object. The command of the run writes it anew")
    return found


def _read_lines(path: epath.Path) -> tuple[Line, ...]:
    lines: list[Line] = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        line: Any = None
        with contextlib.suppress(ValueError):
            line = parse_json(text)
        if not _is_line(line):
            raise UserError(
                f"{path}:{number} is damaged: a line should be a JSON object of numbers, a step among them."
                " Remove the line, or go on with the run, which writes anew what comes after its checkpoint"
            )
        lines.append(line)
    return tuple(lines)


def _is_line(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    return all(isinstance(number, int | float | None) for number in value.values())
