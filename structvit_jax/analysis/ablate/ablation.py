"""Train the runs of an ablation.

An arm is a variant of the configuration. For each arm, the learning rate is selected on validation examples.
Then the arm is trained with all seeds and scored on held-out test examples.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from etils import epath

import structvit_jax
from structvit_jax import data
from structvit_jax.analysis.ablate import results
from structvit_jax.analysis.ablate.results import Outcome, RunResult
from structvit_jax.analysis.ablate.study import Arm, Study, parse_arms, with_overrides
from structvit_jax.config import durations, model_arguments
from structvit_jax.performance.bench.parts import train_program
from structvit_jax.performance.bench.timing import alternate
from structvit_jax.performance.cost import Cost, cost
from structvit_jax.runtime.goodput import wall_seconds
from structvit_jax.runtime.storage import CONFIG, io_errors_as_user_error, read_json, write, write_json
from structvit_jax.training import loop
from structvit_jax.training.card import as_json, differences
from structvit_jax.training.evaluation import Result, read_result
from structvit_jax.training.learner import Learner
from structvit_jax.utils.errors import UserError

_TIMES = "times.json"
_FIRST_TUNING_SEED = 1000  # of the runs that select learning rates
_STEPS_TOLERANCE = 0.05  # runs are used for equal time too if their steps differ by at most this fraction


class Ablation:
    """Trains the runs of a study that are not complete, and writes their results.

    Args:
      config: the common configuration, to which each arm applies its changes.
      study: the arms and the number of runs.
      workdir: folder of the results. It contains the workdirs of the runs.

    Raises:
      UserError: as for `parse_arms`. All configurations are checked before the first run is trained.
    """

    def __init__(self, config: ml_collections.ConfigDict, study: Study, workdir: epath.Path):
        self.arms = parse_arms(config, study)
        self._config, self._study, self._workdir = config, study, workdir
        self._rates = study.lrs or [config.optimizer.lr]
        for arm in self.arms:
            for rate in self._rates:
                with_overrides(config, {"optimizer.lr": rate} | arm.changes)
        self._dataset = data.load(config.data, config.augment, config.train.seed)
        self._steps = durations(config, self._dataset.rows_per_epoch).total

    def run(self, arguments: str) -> list[Outcome]:
        """Train all runs that are not complete. After each arm, write ablation.md, .json and .png.

        Args:
          arguments: the command line, for the heading of ablation.md.

        Raises:
          UserError: the workdir belongs to another ablation.
        """
        outcomes: list[Outcome] = []
        with io_errors_as_user_error(self._workdir):
            self._workdir.mkdir(parents=True, exist_ok=True)
            seconds = self._step_seconds()
            for arm in self.arms:
                lr, tried = self._tune(arm)
                size = self.size(arm)
                runs = [self._train(arm, "steps", lr, seed) for seed in range(self._study.seeds)]
                outcomes.append(Outcome(arm, size.params, size.macs, seconds[arm.name], lr, tried, runs))
                self._write(arguments, outcomes)
            if self._study.same_time:
                reference = seconds[self._study.same_time]
                outcomes = [self._with_equal_time(outcome, reference) for outcome in outcomes]
                self._write(arguments, outcomes)
        path = self._workdir / "ablation.md"
        print(f"\n{path.read_text()}\n{path}")
        return outcomes

    def size(self, arm: Arm) -> Cost:
        """Return the cost of an arm's model: parameters, multiply-accumulates and others."""
        arguments = model_arguments(with_overrides(self._config, arm.changes))
        return cost(arguments.pop("name"), self._dataset.shape, len(self._dataset.class_names), **arguments)

    def _step_seconds(self) -> dict[str, float]:
        """Return the duration of a train step of each arm, in seconds, by name of the arm.

        Waiting for input is not included. The arms are measured in turn, `Study.rounds` times each. The
        medians are saved in WORKDIR/times.json and read from there the next time.
        """
        path, names = self._workdir / _TIMES, [arm.name for arm in self.arms]
        seconds = (read_json(path) or {}) if path.exists() else {}
        if list(seconds) != names:
            print(f"measuring the train step of each of {len(names)} arms", flush=True)
            configs = [with_overrides(self._config, arm.changes) for arm in self.arms]
            calls = {
                name: train_program(Learner.create(config, self._dataset), self._dataset).call
                for name, config in zip(names, configs, strict=True)
            }
            seconds = {name: times.median for name, times in alternate(calls, self._study.rounds).items()}
            write_json(path, seconds)
        return seconds

    def _tune(self, arm: Arm) -> tuple[float, list[RunResult]]:
        """Return the rate with the highest mean top-1 on validation examples, and the runs of all rates."""
        if len(self._rates) == 1:
            return self._rates[0], []
        tried = [
            self._train(
                arm, f"tune/lr={rate:g}", rate, _FIRST_TUNING_SEED + seed, {"data.test_split": "tune"}
            )
            for rate in self._rates
            for seed in range(self._study.tune_seeds)
        ]
        means = [np.mean([run.top1 for run in tried if run.lr == rate]) for rate in self._rates]
        return self._rates[int(np.argmax(means))], tried

    def _with_equal_time(self, outcome: Outcome, seconds: float) -> Outcome:
        """Add runs whose training time is that of the configured number of steps if a step takes `seconds`.

        If this changes the number of steps by at most 5 %, which is about the noise of the measured times,
        the runs with equal steps are used again.
        """
        steps = max(1, round(self._steps * seconds / outcome.seconds))
        if abs(steps - self._steps) <= _STEPS_TOLERANCE * self._steps:
            return outcome._replace(time=outcome.steps)
        changes = {"train.duration": f"{steps} steps"}
        seeds = range(self._study.seeds)
        return outcome._replace(
            time=[self._train(outcome.arm, "time", outcome.lr, seed, changes) for seed in seeds]
        )

    def _train(
        self, arm: Arm, kind: str, lr: float, seed: int, changes: Mapping[str, str] | None = None
    ) -> RunResult:
        """Return the result of a run; train it first if it is not complete.

        Args:
          arm, lr, seed: the arm, learning rate and seed of the run.
          kind: purpose of the run: "steps", "time" or "tune/lr=..."; a folder inside the folder of the arm.
          changes: changes of the configuration in addition to those of the arm.
        """
        changed = {"optimizer.lr": lr, "train.seed": seed} | arm.changes | dict(changes or {})
        config = with_overrides(self._config, changed)
        workdir = self._workdir / arm.folder / kind / f"seed={seed}"
        steps = durations(config, self._dataset.rows_per_epoch).total
        if not (result := _completed(config, workdir, steps)):
            print(f"\n{arm.name}, {kind}, seed {seed}: {workdir}", flush=True)
            dataset = data.load(config.data, config.augment, config.train.seed)
            result = loop.train(config, workdir, dataset)
        return RunResult(seed, lr, steps, result["top1"], wall_seconds(workdir))

    def _write(self, arguments: str, outcomes: Sequence[Outcome]) -> None:
        """Write ablation.md, ablation.json and ablation.png for the arms that are complete."""
        names, dataset = [outcome.arm.name for outcome in outcomes], self._dataset
        against = self._study.against if self._study.against in names else names[0]
        heading = [
            f"`structvit ablate {arguments}`",
            f"on {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__},"
            f" {datetime.date.today():%B %Y}, structvit_jax {structvit_jax.__version__};"
            f" {results.effort(outcomes)}.",
            f"{self._config.data.name}: {dataset.test_examples} test {dataset.unit}, batches of"
            f" {self._config.data.batch_size}.",
        ]
        tables = results.to_markdown(outcomes, against, self._study.same_time, heading)
        write(self._workdir / "ablation.md", tables)
        write(self._workdir / "ablation.json", results.to_json(outcomes, as_json(self._config), self._study))
        chance = 1 / len(dataset.class_names)
        write(self._workdir / "ablation.png", results.plot(outcomes, chance))


def _completed(config: ml_collections.ConfigDict, workdir: epath.Path, steps: int) -> Result | None:
    """Return the result of a run, or None if it is not complete.

    Raises:
      UserError: the workdir contains a run with another configuration.
    """
    if not (workdir / CONFIG).exists():
        return None
    for change in differences(read_json(workdir / CONFIG) or {}, as_json(config)):
        raise UserError(
            f"{workdir} belongs to another ablation: it has config.{change.key}={change.before!r}, and this"
            f" one has {change.after!r}; choose another --workdir"
        )
    return read_result(workdir, steps)
