"""Read the files of a run from its workdir. The run need not be finished."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

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
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import parse_json
from structvit_jax.utils.paths import absolute, parse_path

Metrics = Mapping[str, float | None]  # a line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Record:
    """The contents of the files of a run. Fields of missing files are empty or None."""

    workdir: epath.Path
    name: str  # unique among the runs of a report
    config: ml_collections.ConfigDict
    metrics: tuple[Metrics, ...]  # lines of training steps and evaluations, in order
    result: Mapping[str, Any]
    predictions: Predictions | None
    seconds: Mapping[str, float]  # wall time by activity, see `structvit_jax.runtime.goodput`

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((int(line["step"] or 0) for line in self.metrics), default=0)

    @property
    def unit(self) -> str:
        return "clips" if self.config.data.frames else "images"

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values [points] of a metric, such as loss or eval_top1."""
        points = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        steps, values = np.array(points, np.float64).reshape(-1, 2).T
        return steps, values

    @property
    def rate(self) -> float | None:
        """Examples per second of training, including the time spent waiting for input."""
        seconds = self.seconds.get("step", 0) + self.seconds.get("input", 0)
        return self.step * self.config.data.batch_size / seconds if seconds else None

    @functools.cached_property
    def parameters(self) -> int | None:
        """Parameter count of the model; None if the classes or the model are unknown."""
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

    def notes(self) -> list[str]:
        """Return a sentence for each file that is missing or outdated."""
        notes = []
        if not self.metrics:
            notes.append(f"Not trained yet: there is no {METRICS}, so there are no curves.")
        if not self.result:
            notes.append(f"Not evaluated yet: there is no {RESULT}, so there are no scores.")
        if not self.predictions:
            notes.append(f"There is no {PREDICTIONS}, so there are no results by class or example.")
        if not self.seconds:
            notes.append(f"There is no {goodput.FILE}, so wall time is unknown.")
        scored = self.result.get("step", self.step)
        if self.metrics and scored != self.step:
            notes.append(f"The scores were computed at step {scored}; the run is at step {self.step}.")
        return notes


def read_records(workdirs: Sequence[str]) -> list[Record]:
    """Read runs. A workdir that is given twice is read once.

    Raises:
      UserError: a folder is not the workdir of a run, or a file is damaged.
      OSError: a file cannot be read.
    """
    paths = [absolute(parse_path(workdir)) for workdir in dict.fromkeys(workdirs)]
    names = [path.name for path in paths]
    return [_read_record(path, path.name if names.count(path.name) == 1 else str(path)) for path in paths]


def _read_record(workdir: epath.Path, name: str) -> Record:
    if not workdir.is_dir():
        raise UserError(f"no folder at {workdir}: it should be the --workdir of a run")
    if not (workdir / CONFIG).exists():
        raise UserError(
            f"{workdir} is not the --workdir of a run: there is no {CONFIG}, which structvit train writes"
            " when it starts"
        )
    config = from_card(_read_object(workdir / CONFIG), workdir / CONFIG, any_model=True)
    metrics, result = _read_metrics(workdir / METRICS), _read_object(workdir / RESULT)
    path = workdir / PREDICTIONS
    predictions = read_predictions(path) if path.exists() else None
    return Record(workdir, name, config, metrics, result, predictions, goodput.seconds_of(workdir))


def _read_object(path: epath.Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no file."""
    if not path.exists():
        return {}
    if (value := read_json(path)) is None:
        raise UserError(
            f"{path} is damaged: it contains no JSON object. Re-run the command that wrote it to fix it"
        )
    return value


def _read_metrics(path: epath.Path) -> tuple[Metrics, ...]:
    metrics = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if not _is_metrics(line):
            raise UserError(
                f"{path}:{number} is damaged: a line should be a JSON object of numbers, including step."
                " Remove the line, or resume the run, which rewrites all lines after its checkpoint"
            )
        metrics.append(line)
    return tuple(metrics)


def _is_metrics(value: object) -> TypeGuard[Metrics]:
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    return all(isinstance(number, int | float | None) for number in value.values())
