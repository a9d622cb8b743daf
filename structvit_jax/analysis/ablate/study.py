"""Run a whole ablation and write its results after every arm."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import jax
import ml_collections
from etils import epath

import structvit_jax
from structvit_jax.analysis.ablate import results
from structvit_jax.analysis.ablate.grid import Ablation, Study
from structvit_jax.analysis.ablate.results import Outcome
from structvit_jax.runtime.storage import io_errors_as_user_error, write
from structvit_jax.training.card import as_json

_SAME_STEPS = 0.05  # fraction by which equal time may differ from equal steps without further runs


def run(
    config: ml_collections.ConfigDict, study: Study, workdir: epath.Path, arguments: str
) -> list[Outcome]:
    """Train the runs that are not complete; write ablation.md, ablation.json and ablation.png.

    Args:
      config: see `structvit_jax.config`.
      study: the arms and the number of runs.
      workdir: folder of the runs and the results.
      arguments: the command line, for the heading of ablation.md.

    Raises:
      UserError: invalid arms, or the workdir of another ablation.
    """
    ablation = Ablation(config, study, workdir)
    outcomes: list[Outcome] = []
    with io_errors_as_user_error(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        seconds = ablation.step_seconds()
        for arm in ablation.arms:
            lr, tried = ablation.tune(arm)
            size, runs = ablation.size(arm), ablation.runs(arm, lr)
            outcomes.append(Outcome(arm, size, seconds[arm.name], lr, tried, runs, ()))
            _write(ablation, config, workdir, arguments, outcomes)
        if study.same_time:
            reference = seconds[study.same_time]
            outcomes = [_with_equal_time(ablation, outcome, reference) for outcome in outcomes]
            _write(ablation, config, workdir, arguments, outcomes)
    print(f"\n{(workdir / 'ablation.md').read_text()}\n{workdir / 'ablation.md'}")
    return outcomes


def _with_equal_time(ablation: Ablation, outcome: Outcome, seconds: float) -> Outcome:
    """Add runs that take as long as all steps of `seconds` each.

    If their number of steps is the configured one within 5 %, about the noise of the measured times, the runs
    with equal steps are used.
    """
    steps = max(1, round(ablation.steps * seconds / outcome.seconds))
    if abs(steps - ablation.steps) <= _SAME_STEPS * ablation.steps:
        return outcome._replace(time=outcome.steps)
    return outcome._replace(time=ablation.runs(outcome.arm, outcome.lr, steps))


def _write(
    ablation: Ablation,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    arguments: str,
    outcomes: Sequence[Outcome],
) -> None:
    """Write the results of the arms that are complete."""
    names = [outcome.arm.name for outcome in outcomes]
    study = ablation.study
    against = study.against if study.against in names else names[0]
    heading = [
        f"`structvit ablate {arguments}`",
        f"on {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__},"
        f" {datetime.date.today():%B %Y}, structvit_jax {structvit_jax.__version__}; {_effort(outcomes)}.",
        f"{config.data.name}: {config.data.test_examples} test clips, batches of {config.data.batch_size}.",
    ]
    write(workdir / "ablation.md", results.to_markdown(outcomes, against, study.same_time, heading))
    write(workdir / "ablation.json", results.to_json(outcomes, as_json(config), study))
    write(workdir / "ablation.png", results.plot(outcomes, 1 / ablation.classes))


def _effort(outcomes: Sequence[Outcome]) -> str:
    """Return the number of runs and their hours."""
    runs = [run for outcome in outcomes for run in (*outcome.tried, *outcome.steps)]
    runs += [run for outcome in outcomes if outcome.time is not outcome.steps for run in outcome.time]
    return f"{len(runs)} runs, {sum(run.took for run in runs) / 3600:.1f} hours"
