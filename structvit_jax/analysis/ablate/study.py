"""An ablation from its first run to its table."""

from __future__ import annotations

import datetime

import jax
import ml_collections
from etils import epath

import structvit_jax
from structvit_jax.analysis.ablate import results
from structvit_jax.analysis.ablate.grid import Ablation, Study
from structvit_jax.runtime.storage import io_errors_as_user_error, write
from structvit_jax.training.card import as_json

_ALIKE = 0.05  # of the time of a step


def run(
    config: ml_collections.ConfigDict, study: Study, workdir: epath.Path, words: str
) -> list[results.Outcome]:
    """Trains all that is not trained yet, and writes what it comes to.

    Args:
      config: see `structvit_jax.config`.
      study: what is compared.
      workdir: where the runs and the tables go.
      words: the command's arguments, for the table.

    Raises:
      UserError: arms that are not understood, or a workdir of another ablation.
    """
    ablation = Ablation(config, study, workdir)
    outcomes: list[results.Outcome] = []
    with io_errors_as_user_error(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        seconds = ablation.step_seconds()
        for arm in ablation.arms:
            lr, tried = ablation.tuned(arm)
            size, runs = ablation.size(arm), ablation.runs(arm, lr)
            outcomes.append(results.Outcome(arm, size, seconds[arm.name], lr, tried, runs, ()))
            _write(ablation, config, workdir, words, outcomes)
        if name := study.same_time:
            outcomes = [_timed(ablation, outcome, seconds[name]) for outcome in outcomes]
            _write(ablation, config, workdir, words, outcomes)
    print(f"\n{(workdir / 'ablation.md').read_text()}\n{workdir / 'ablation.md'}")
    return outcomes


def _timed(ablation: Ablation, outcome: results.Outcome, seconds: float) -> results.Outcome:
    """The outcome with runs of as many steps as take the time of all steps of `seconds` each. Where those are
    as many as configured, but for what turns differ by anyway, the runs are those of equal steps."""
    steps = max(1, round(ablation.steps * seconds / outcome.seconds))
    if abs(steps - ablation.steps) <= _ALIKE * ablation.steps:
        return outcome._replace(time=outcome.steps)
    return outcome._replace(time=ablation.runs(outcome.arm, outcome.lr, steps))


def _write(
    ablation: Ablation,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    words: str,
    outcomes: list[results.Outcome],
) -> None:
    """The table, the numbers and the plot of the arms that are done."""
    names = [outcome.arm.name for outcome in outcomes]
    against = ablation.study.against or names[0]
    if against not in names:  # not done yet
        against = names[0]
    heading = [
        f"`structvit ablate {words}`",
        f"on {_machine()}, {datetime.date.today():%B %Y}, structvit_jax {structvit_jax.__version__};"
        f" {_effort(outcomes)}.",
        f"{config.data.name}: {config.data.test_examples} test clips, batches of {config.data.batch_size}.",
    ]
    write(workdir / "ablation.md", results.document(outcomes, against, ablation.study.same_time, heading))
    write(workdir / "ablation.json", results.numbers(outcomes, as_json(config), ablation.study))
    write(workdir / "ablation.png", results.plot(outcomes, 1 / ablation.classes))


def _effort(outcomes: list[results.Outcome]) -> str:
    """How many runs there were, and how long they took."""
    runs = [run for one in outcomes for run in (*one.tried, *one.steps)]
    runs += [run for one in outcomes if one.time is not one.steps for run in one.time]
    return f"{len(runs)} runs, {sum(run.took for run in runs) / 3600:.1f} hours"


def _machine() -> str:
    device = jax.devices()[0]
    return f"{len(jax.devices())} x {device.device_kind}, jax {jax.__version__}"
