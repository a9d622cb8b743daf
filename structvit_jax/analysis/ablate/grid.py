"""The runs of an ablation: arms x learning rates on clips to tune on, then arms x seeds on fresh ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
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
from structvit_jax.training.learner import Learner
from structvit_jax.training.result import Result, read_result
from structvit_jax.utils.errors import UserError, check_choice

_TIMES = "times.json"
_TUNING = 1000  # seeds from here on are for choosing learning rates


class Arm(NamedTuple):
    """What one arm changes of the configuration."""

    name: str
    changes: dict[str, Any]  # values by key, as {"model.structure_dim": 4}

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("_")


class Study(NamedTuple):
    """What is compared, and how often."""

    arms: Sequence[str]  # each "NAME: key=value key=value", as "D = 4: model.structure_dim=4"
    against: str = ""  # the arm that others are compared with; "" is the first
    same_time: str = ""  # the arm whose time all others get in further runs; "" makes none
    lrs: Sequence[float] = ()  # peak learning rates, of which each arm takes its best; () is optimizer.lr
    tune_seeds: int = 2  # runs of each learning rate, on validation clips
    seeds: int = 5  # runs of each arm, on held-out test clips
    rounds: int = 5  # measurements of a step, of which the median counts


def arms(config: ml_collections.ConfigDict, study: Study) -> list[Arm]:
    """Return the arms of a study.

    Raises:
      UserError: one that is written otherwise, two of the same name, an unknown key, or a model that is none.
    """
    found = [_arm(text) for text in study.arms]
    if len(found) < 2:
        raise UserError(
            "a study has to name two arms at least: --arms='NAME: key=value'; see configs/ablate_digits.py"
        )
    if len({arm.folder for arm in found}) < len(found):
        raise UserError(f"--arms: names should differ: {', '.join(arm.name for arm in found)}")
    for arm in found:
        get_variant(**model_arguments(with_overrides(config, arm.changes)))
    for key in ("against", "same_time"):
        if name := getattr(study, key):
            check_choice(f"arm in --{key}", name, [arm.name for arm in found])
    return found


def _arm(text: str) -> Arm:
    name, colon, words = str(text).partition(":")
    pairs = [word.partition("=") for word in words.split()]
    if not colon or not name.strip() or not all(equals and value for _, equals, value in pairs):
        raise UserError(f"--arms={text!r} should be 'NAME: key=value key=value'")
    return Arm(name.strip(), {key: _value(value) for key, _, value in pairs})


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def with_overrides(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> ml_collections.ConfigDict:
    """A configuration with other values.

    Raises:
      UserError: a key that is not there, or a value that it does not take.
    """
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        part = config
        for word in filter(None, section.split(".")):
            part = part[check_choice("section of the configuration", word, part.keys())]
        check_choice(f"key of config.{section}", name, part.keys())
        try:
            part[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key} does not take {value!r}: {error}") from error
    check_config(config)
    return config


class RunResult(NamedTuple):
    """What a run came to."""

    seed: int
    lr: float
    steps: int
    top1: float
    took: float  # seconds, over all its restarts


class Size(NamedTuple):
    """Of an arm's model."""

    params: int
    macs: int  # multiply-accumulates of one example


class Ablation:
    """Trains what is not trained yet; what was interrupted goes on.

    Args:
      config: of all arms, before their changes.
      study: what is compared.
      workdir: gets a folder for each run, of the workdir of `structvit_jax.main`.
    """

    def __init__(self, config: ml_collections.ConfigDict, study: Study, workdir: epath.Path):
        self.arms, self.study = arms(config, study), study
        self._config, self._workdir = config, workdir
        for arm in self.arms:
            for rate in self._rates:
                with_overrides(
                    config, {"optimizer.lr": rate} | arm.changes
                )  # each is checked before any is trained
        self._dataset = data.load(config.data, config.augment, config.train.seed)
        self.classes = len(self._dataset.class_names)
        self.steps = durations(config, self._dataset.rows_per_epoch).total

    @property
    def _rates(self) -> Sequence[float]:
        """The learning rates to try."""
        return self.study.lrs or [self._config.optimizer.lr]

    def size(self, arm: Arm) -> Size:
        arguments = model_arguments(with_overrides(self._config, arm.changes))
        counted = cost(arguments.pop("name"), self._dataset.shape, self.classes, **arguments)
        return Size(counted.params, counted.macs)

    def step_seconds(self) -> dict[str, float]:
        """What a train step of each arm takes, without its input: medians of turns that all arms take.
        Measured once, and kept in WORKDIR/times.json."""
        path, names = self._workdir / _TIMES, [arm.name for arm in self.arms]
        kept = (read_json(path) or {}) if path.exists() else {}
        if list(kept) != names:
            print(f"timing a step of {len(names)} arms in turns", flush=True)
            configs = [with_overrides(self._config, arm.changes) for arm in self.arms]
            calls = {
                name: train_program(Learner.create(config, self._dataset), self._dataset).call
                for name, config in zip(names, configs, strict=True)
            }
            kept = {name: times.median for name, times in alternate(calls, self.study.rounds).items()}
            write_json(path, kept)
        return kept

    def tuned(self, arm: Arm) -> tuple[float, list[RunResult]]:
        """The learning rate that is best on clips to tune on, by the mean over seeds; and all tried."""
        options, rates = self.study, self._rates
        if len(rates) == 1:
            return rates[0], []
        tried = [
            self._run(arm, f"tune/lr={rate:g}", lr=rate, seed=_TUNING + seed, tune=True)
            for rate in rates
            for seed in range(options.tune_seeds)
        ]
        means = [np.mean([one.top1 for one in tried if one.lr == rate]) for rate in rates]
        return rates[int(np.argmax(means))], tried

    def runs(self, arm: Arm, lr: float, steps: int | None = None) -> list[RunResult]:
        """Of all seeds, on test clips; for as many steps as configured, or so many."""
        kind = "time" if steps else "steps"
        seeds = range(self.study.seeds)
        return [self._run(arm, kind, lr=lr, seed=seed, steps=steps) for seed in seeds]

    def _run(
        self, arm: Arm, kind: str, *, lr: float, seed: int, steps: int | None = None, tune: bool = False
    ) -> RunResult:
        changes = {"optimizer.lr": lr, "train.seed": seed} | arm.changes
        if steps:
            changes["train.duration"] = f"{steps} steps"
        if tune:
            changes["data.test_split"] = "tune"
        config, workdir = (
            with_overrides(self._config, changes),
            self._workdir / arm.folder / kind / f"seed={seed}",
        )
        total = steps or self.steps
        if not (result := _finished(config, workdir, total)):
            print(f"\n{arm.name}, {kind}, seed {seed}: {workdir}", flush=True)
            dataset = data.load(config.data, config.augment, config.train.seed)
            result = loop.train(config, workdir, dataset)
        return RunResult(seed, lr, total, result["top1"], wall_seconds(workdir))


def _finished(config: ml_collections.ConfigDict, workdir: epath.Path, steps: int) -> Result | None:
    """The result of a run that is complete.

    Raises:
      UserError: it was trained with another configuration.
    """
    if not (workdir / CONFIG).exists():
        return None
    changes = differences(read_json(workdir / CONFIG) or {}, as_json(config))
    if changes:
        raise UserError(
            f"{workdir} is of another ablation: {'; '.join(c.describe() for c in changes[:3])}; choose"
            " another --workdir"
        )
    return read_result(workdir, steps)
