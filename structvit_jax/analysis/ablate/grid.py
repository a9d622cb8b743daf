"""The runs of an ablation: arms x learning rates on validation clips, then arms x seeds on test clips."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from structvit_jax import data
from structvit_jax.config import check_config, durations, model_arguments
from structvit_jax.models import get_variant
from structvit_jax.performance.bench.parts import train_program
from structvit_jax.performance.bench.timing import alternate
from structvit_jax.performance.cost import cost
from structvit_jax.runtime.goodput import wall_seconds
from structvit_jax.runtime.storage import CONFIG, read_json, write_json
from structvit_jax.training import loop
from structvit_jax.training.card import as_json, differences
from structvit_jax.training.evaluation import Result, read_result
from structvit_jax.training.learner import Learner
from structvit_jax.utils.errors import UserError, check_choice

_TIMES = "times.json"
_TUNING = 1000  # first seed of runs that select learning rates


class Arm(NamedTuple):
    """A variant of the configuration."""

    name: str
    changes: dict[str, Any]  # values by key, as {"model.structure_dim": 4}

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("_")


class Study(NamedTuple):
    """The arms and how often each is trained."""

    arms: Sequence[str]  # each "NAME: key=value key=value", as "D = 4: model.structure_dim=4"
    against: str = ""  # the arm that the others are compared with; "" is the first
    same_time: str = ""  # the arm whose training time all others get in further runs; "" for no such runs
    lrs: Sequence[float] = ()  # peak learning rates, of which each arm gets its best; () is optimizer.lr
    tune_seeds: int = 2  # runs of each learning rate, on validation clips
    seeds: int = 5  # runs of each arm, on held-out test clips
    rounds: int = 5  # measurements of a step, of which the median is used


class RunResult(NamedTuple):
    """Results of a run."""

    seed: int
    lr: float
    steps: int
    top1: float
    took: float  # seconds, over all restarts


class Size(NamedTuple):
    """Size of an arm's model."""

    params: int
    macs: int  # multiply-accumulates of one example


def parse_arms(config: ml_collections.ConfigDict, study: Study) -> list[Arm]:
    """Return the arms of a study.

    Raises:
      UserError: fewer than two arms, a malformed arm, equal names, an unknown key, or an invalid model.
    """
    arms = [_parse_arm(text) for text in study.arms]
    if len(arms) < 2:
        raise UserError(
            "a study needs at least two arms: --arms='NAME: key=value'; see configs/ablate_digits.py"
        )
    if len({arm.folder for arm in arms}) < len(arms):
        raise UserError(f"--arms: names should differ: {', '.join(arm.name for arm in arms)}")
    for arm in arms:
        get_variant(**model_arguments(with_overrides(config, arm.changes)))
    for option, name in (("against", study.against), ("same_time", study.same_time)):
        if name:
            check_choice(f"arm in --{option}", name, [arm.name for arm in arms])
    return arms


def _parse_arm(text: str) -> Arm:
    name, colon, changes = str(text).partition(":")
    pairs = [change.partition("=") for change in changes.split()]
    if not colon or not name.strip() or not all(equals and value for _, equals, value in pairs):
        raise UserError(f"--arms={text!r} should be 'NAME: key=value key=value'")
    return Arm(name.strip(), {key: _parse_value(value) for key, _, value in pairs})


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def with_overrides(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Return a copy of a configuration with other values.

    Raises:
      UserError: an unknown key, or a value that it does not take.
    """
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        *sections, name = key.split(".")
        part = config
        for section in sections:
            part = part[check_choice("section of the configuration", section, part.keys())]
        check_choice(f"key of config.{'.'.join(sections)}", name, part.keys())
        try:
            part[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key} does not take {value!r}: {error}") from error
    check_config(config)
    return config


class Ablation:
    """Trains the runs that are not complete; interrupted ones are resumed.

    Args:
      config: of all arms, before their changes.
      study: the arms and the number of runs.
      workdir: gets a folder for each run, which is its workdir.

    Raises:
      UserError: see `parse_arms`; all configurations are checked before any run is trained.
    """

    def __init__(self, config: ml_collections.ConfigDict, study: Study, workdir: epath.Path):
        self.arms, self.study = parse_arms(config, study), study
        self._config, self._workdir = config, workdir
        self._rates = study.lrs or [config.optimizer.lr]
        for arm in self.arms:
            for rate in self._rates:
                with_overrides(config, {"optimizer.lr": rate} | arm.changes)
        self._dataset = data.load(config.data, config.augment, config.train.seed)
        self.classes = len(self._dataset.class_names)
        self.steps = durations(config, self._dataset.rows_per_epoch).total

    def size(self, arm: Arm) -> Size:
        """Return the size of an arm's model."""
        arguments = model_arguments(with_overrides(self._config, arm.changes))
        counted = cost(arguments.pop("name"), self._dataset.shape, self.classes, **arguments)
        return Size(counted.params, counted.macs)

    def step_seconds(self) -> dict[str, float]:
        """Return the seconds of a train step of each arm, without input, by name.

        Arms are measured alternately, each `Study.rounds` times, and their medians are kept in
        WORKDIR/times.json.
        """
        path, names = self._workdir / _TIMES, [arm.name for arm in self.arms]
        seconds = (read_json(path) or {}) if path.exists() else {}
        if list(seconds) != names:
            print(f"measuring a train step of {len(names)} arms", flush=True)
            configs = [with_overrides(self._config, arm.changes) for arm in self.arms]
            calls = {
                name: train_program(Learner.create(config, self._dataset), self._dataset).call
                for name, config in zip(names, configs, strict=True)
            }
            seconds = {name: times.median for name, times in alternate(calls, self.study.rounds).items()}
            write_json(path, seconds)
        return seconds

    def tune(self, arm: Arm) -> tuple[float, list[RunResult]]:
        """Return the learning rate with the highest mean top-1 on validation clips, and all runs."""
        if len(self._rates) == 1:
            return self._rates[0], []
        tried = [
            self._run(arm, f"tune/lr={rate:g}", lr=rate, seed=_TUNING + seed, on_validation=True)
            for rate in self._rates
            for seed in range(self.study.tune_seeds)
        ]
        means = [np.mean([run.top1 for run in tried if run.lr == rate]) for rate in self._rates]
        return self._rates[int(np.argmax(means))], tried

    def runs(self, arm: Arm, lr: float, steps: int | None = None) -> list[RunResult]:
        """Return the results of all seeds on test clips, after `steps` or the configured number of steps."""
        kind = "time" if steps else "steps"
        return [self._run(arm, kind, lr=lr, seed=seed, steps=steps) for seed in range(self.study.seeds)]

    def _run(
        self,
        arm: Arm,
        kind: str,
        *,
        lr: float,
        seed: int,
        steps: int | None = None,
        on_validation: bool = False,
    ) -> RunResult:
        changes = {"optimizer.lr": lr, "train.seed": seed} | arm.changes
        if steps:
            changes["train.duration"] = f"{steps} steps"
        if on_validation:
            changes["data.test_split"] = "tune"
        config = with_overrides(self._config, changes)
        workdir, total = self._workdir / arm.folder / kind / f"seed={seed}", steps or self.steps
        if not (result := _completed(config, workdir, total)):
            print(f"\n{arm.name}, {kind}, seed {seed}: {workdir}", flush=True)
            dataset = data.load(config.data, config.augment, config.train.seed)
            result = loop.train(config, workdir, dataset)
        return RunResult(seed, lr, total, result["top1"], wall_seconds(workdir))


def _completed(config: ml_collections.ConfigDict, workdir: epath.Path, steps: int) -> Result | None:
    """Return the result of a complete run; None if it is not complete.

    Raises:
      UserError: the workdir belongs to a run with another configuration.
    """
    if not (workdir / CONFIG).exists():
        return None
    for change in differences(read_json(workdir / CONFIG) or {}, as_json(config)):
        raise UserError(
            f"{workdir} is of another ablation, with config.{change.key}={change.before!r}, not"
            f" {change.after!r}; choose another --workdir"
        )
    return read_result(workdir, steps)
