"""Train the runs of an ablation.

Each arm selects its learning rate on validation clips; then it is trained with all seeds and scored on
held-out test clips.
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
_TUNING = 1000  # first seed of runs that select learning rates
_SAME_STEPS = 0.05  # fraction by which equal time may differ from equal steps without further runs


class Ablation:
    """Trains the runs of a study that are not complete, and writes their results.

    Args:
      config: of all arms, before their changes.
      study: the arms and the number of runs.
      workdir: folder of the results, with a folder for each run, which is its workdir.

    Raises:
      UserError: see `parse_arms`; all configurations are checked before any run is trained.
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
        """Train what is missing; write ablation.md, ablation.json and ablation.png after every arm.

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
        """Return the parameters and multiply-accumulates of an arm's model."""
        arguments = model_arguments(with_overrides(self._config, arm.changes))
        return cost(arguments.pop("name"), self._dataset.shape, len(self._dataset.class_names), **arguments)

    def _step_seconds(self) -> dict[str, float]:
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
            seconds = {name: times.median for name, times in alternate(calls, self._study.rounds).items()}
            write_json(path, seconds)
        return seconds

    def _tune(self, arm: Arm) -> tuple[float, list[RunResult]]:
        """Return the learning rate with the highest mean top-1 on validation clips, and all runs."""
        if len(self._rates) == 1:
            return self._rates[0], []
        tried = [
            self._train(arm, f"tune/lr={rate:g}", rate, _TUNING + seed, {"data.test_split": "tune"})
            for rate in self._rates
            for seed in range(self._study.tune_seeds)
        ]
        means = [np.mean([run.top1 for run in tried if run.lr == rate]) for rate in self._rates]
        return self._rates[int(np.argmax(means))], tried

    def _with_equal_time(self, outcome: Outcome, seconds: float) -> Outcome:
        """Add runs that take as long as the configured number of steps of `seconds` each.

        The runs with equal steps are used if the number of steps differs by at most 5 %, about the noise of
        the measured times.
        """
        steps = max(1, round(self._steps * seconds / outcome.seconds))
        if abs(steps - self._steps) <= _SAME_STEPS * self._steps:
            return outcome._replace(time=outcome.steps)
        changes = {"train.duration": f"{steps} steps"}
        seeds = range(self._study.seeds)
        return outcome._replace(
            time=[self._train(outcome.arm, "time", outcome.lr, seed, changes) for seed in seeds]
        )

    def _train(
        self, arm: Arm, kind: str, lr: float, seed: int, changes: Mapping[str, str] | None = None
    ) -> RunResult:
        """Return the result of a run; train it if it is not complete.

        Args:
          arm, lr, seed: of the run.
          kind: its folder inside the arm's.
          changes: further changes of the configuration.
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
        """Write the results of the arms that are complete."""
        names, section = [outcome.arm.name for outcome in outcomes], self._config.data
        against = self._study.against if self._study.against in names else names[0]
        heading = [
            f"`structvit ablate {arguments}`",
            f"on {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__},"
            f" {datetime.date.today():%B %Y}, structvit_jax {structvit_jax.__version__};"
            f" {results.effort(outcomes)}.",
            f"{section.name}: {section.test_examples} test clips, batches of {section.batch_size}.",
        ]
        tables = results.to_markdown(outcomes, against, self._study.same_time, heading)
        write(self._workdir / "ablation.md", tables)
        write(self._workdir / "ablation.json", results.to_json(outcomes, as_json(self._config), self._study))
        chance = 1 / len(self._dataset.class_names)
        write(self._workdir / "ablation.png", results.plot(outcomes, chance))


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
