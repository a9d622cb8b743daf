"""A run from its first line to its result: `train` and `evaluate` are what the commands call."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from etils import epath

from structvit_jax.models.weights import Weights, sha256, split
from structvit_jax.runtime import processes, signals
from structvit_jax.runtime.goodput import Goodput
from structvit_jax.runtime.lock import WorkdirLock
from structvit_jax.runtime.mesh import check_batch, put_batch
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.profile import Profile, steps_to_profile
from structvit_jax.runtime.sharding import replicated
from structvit_jax.runtime.storage import (
    CONFIG,
    PREDICTIONS,
    RESULT,
    io_errors_as_user_error,
    read_json,
    write_json,
)
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.commit import FOLDER
from structvit_jax.training.compilation import compile_train_step, oom_as_user_error
from structvit_jax.training.evaluation import Evaluation, Evaluator, Scores
from structvit_jax.training.log import RunLog
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.run import (
    Run,
    adopt_classes,
    as_json,
    differences,
    retention_policy,
    warn_of_single_examples,
)
from structvit_jax.training.start import starting_state
from structvit_jax.training.step import TrainState
from structvit_jax.training.unreadable import Unreadable
from structvit_jax.utils.errors import Stopped, UserError

_LEAST_INTERVAL = 0.1  # of config.eval.every, between an evaluation and the final one
# Keys of the data that change no score.
_INDIFFERENT = tuple(
    f"config.data.{key} "
    for key in ("batch_size", "workers", "max_unreadable_fraction", "max_pixels", "max_frames")
)
# Keys that say which data are read; the fingerprint in a card says it better.
_PLACES = tuple(
    f"config.data.{key} "
    for key in (
        *("name", "root", "train_split", "test_split", "val_fraction", "train_examples", "test_examples"),
        "label_maps",
    )
)


def train(
    config: ml_collections.ConfigDict, workdir: epath.Path, data: Any, *, profile: str = ""
) -> dict[str, Any]:
    """Trains, or goes on training, until the configured duration; evaluates; returns the result.

    Args:
      config: see `structvit_jax.config`.
      workdir: where checkpoints, metrics and result live; a run in it is resumed.
      data: a `structvit_jax.data.Dataset`.
      profile: steps whose profile is written to WORKDIR/profile, as "START:STOP"; "" is none.

    Raises:
      UserError: a configuration, checkpoint or workdir that does not fit.
      Stopped: a signal asked for it; the state is saved.
    """
    started, profiled = time.monotonic(), steps_to_profile(profile)
    with processes.StopSignal() as stop, oom_as_user_error(config):
        run = Run.prepare(config, data)
        with open_workdir(run, workdir) as session:
            return _train(session, stop, started, profiled)


@dataclasses.dataclass(frozen=True)
class Session:
    """A run that has its workdir for itself."""

    run: Run
    workdir: epath.Path
    lock: WorkdirLock
    checkpoints: Checkpoints
    unreadable: Unreadable


@contextlib.contextmanager
def open_workdir(run: Run, workdir: epath.Path) -> Iterator[Session]:
    """Makes the workdir where there is none, locks it, and opens its checkpoints.

    Raises:
      UserError: it cannot be used, or another run uses it.
    """
    lock = WorkdirLock(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(io_errors_as_user_error(workdir))
        if processes.is_primary():
            (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
            stack.enter_context(signals.LISTENER.cleanup(lock.release))
            stack.enter_context(lock)
        processes.barrier()  # the others look at it when it is there, and locked
        checkpoints = stack.enter_context(Checkpoints(workdir, retention_policy(run)))
        unreadable = Unreadable(workdir, run.data.train_examples, run.config.data.max_unreadable_fraction)
        yield Session(run, workdir, lock, checkpoints, unreadable)


def _train(session: Session, stop: processes.StopSignal, started: float, profiled: range) -> dict[str, Any]:
    run, workdir, data, config = session.run, session.workdir, session.run.data, session.run.config
    goodput = Goodput(workdir, started)
    goodput.switch("restore")
    state = starting_state(run, session.checkpoints)
    start, total = int(state.step), run.durations.total
    goodput.resume(start)
    if start >= total:
        log(f"the run is complete: step {start} of {total}; --config.train.duration sets more")
        if result := processes.broadcast_from_primary(lambda: read_result(workdir, start)):
            log(describe(result))
            return result
    else:
        check_batch(run.mesh, "data.batch_size", config.data.batch_size, config.train.grad_accum_steps)
        warn_of_single_examples(run)
        if processes.is_primary():
            write_json(workdir / CONFIG, as_json(config))
    evaluator = Evaluator(run.model, config, run.mesh, data)
    with RunLog(workdir, start, total, config, data, goodput, session.lock.check) as run_log:
        try:
            if start < total:
                state = take_steps(session, state, stop, evaluator, run_log, goodput, profiled)
            log(f"evaluating {describe_test(data)}")
            goodput.switch("evaluate")
            scored = state.scored(config.eval.ema)
            evaluation = evaluator(scored, lambda batch: _stop_in_the_end(stop, total, batch))
            session.unreadable.note("test", evaluation.problems)
            session.unreadable.exchange()
            scores = evaluation.summary()
            run_log.evaluation(int(state.step), scores._asdict())
        finally:
            log(goodput.describe())
    result = make_result(run, scores, int(state.step), scored)
    session.lock.check()
    write_result(workdir, result, evaluation, data)
    log(describe(result))
    return result


def _stop_in_the_end(stop: processes.StopSignal, total: int, batch: int) -> None:
    """Ends the last evaluation on a signal: all that was trained is saved."""
    if stop.before(total + 1 + batch):
        raise Stopped(
            f"stopped by a signal in the evaluation after step {total}; re-run the command to evaluate"
        )


def take_steps(
    session: Session,
    state: TrainState,
    stop: processes.StopSignal,
    evaluator: Evaluator,
    run_log: RunLog,
    goodput: Goodput,
    profiled: range = range(0),
) -> TrainState:
    """All steps that are left.

    The order is what makes resuming exact: step, log, evaluate, write, save. A checkpoint of step n
    implies that every line up to n is in metrics.jsonl, and what follows is dropped on resuming.
    """
    run, start = session.run, int(state.step)
    total, eval_every = run.durations.total, run.durations.eval_every
    save_every = (run.durations.save_every, run.durations.keep_every)
    goodput.switch("compile")
    step_fn = compile_train_step(run, state)
    run_log.restart_clock()
    stream = run.data.train_batches(
        run.config.data.batch_size, start_step=start, shard=processes.process_shard()
    )
    profile = Profile(profiled, session.workdir, start)
    with contextlib.closing(stream) as batches, profile:
        saved = start
        for step in range(start + 1, total + 1):
            if stop.before(step):
                if saved < step - 1:
                    save(session, state, run_log, goodput)
                raise Stopped(
                    f"stopped by a signal after step {step - 1} of {total}; re-run the command to resume"
                )
            goodput.switch("input")
            asked = time.monotonic()
            rows = next(batches)
            session.unreadable.note("train", rows["problems"])
            batch = put_batch(run.mesh, rows)
            waited = time.monotonic() - asked
            goodput.switch("step")
            profile.before(step, state)
            state, metrics = step_fn(state, batch)
            run_log.step(step, metrics, waited)
            scores = None
            if evaluation_due(step, eval_every, total):
                run_log.flush()
                goodput.switch("evaluate")
                scored = state.scored(run.config.eval.ema)
                scores = evaluate_on_the_way(step, evaluator(scored), run_log, session.unreadable)
            due = any(every and step % every == 0 for every in save_every)
            ranked = scores is not None and run.config.checkpoint.keep_best
            if step == total or due or ranked:
                save(session, state, run_log, goodput, scores)
                saved = step
    return state


def evaluation_due(step: int, every: int, total: int) -> bool:
    """Whether to evaluate after a step: at multiples of `every` (0 is never), but not right before the final
    evaluation, which follows step `total` anyway."""
    return every > 0 and step % every == 0 and total - step >= _LEAST_INTERVAL * every


def save(
    session: Session, state: TrainState, run_log: RunLog, goodput: Goodput, scores: Scores | None = None
) -> None:
    """Starts saving the state, when all that was said of the steps up to it is written."""
    session.lock.check()
    session.unreadable.exchange()
    run_log.flush()
    goodput.switch("save")
    goodput.saved(int(state.step))
    run_log.write()
    found = scores._asdict() if scores else None
    session.checkpoints.save(state, session.run.card(found), found)
    run_log.restart_clock()


def evaluate_on_the_way(
    step: int, evaluation: Evaluation, run_log: RunLog, unreadable: Unreadable
) -> Scores | None:
    """Tells an evaluation during training; one that has no score stops nothing."""
    unreadable.note("test", evaluation.problems)
    unreadable.exchange()
    try:
        scores = evaluation.summary()
    except UserError as error:
        log(f"step {step}  evaluation: {error}")
        run_log.restart_clock()
        return None
    run_log.evaluation(step, scores._asdict())
    log(f"step {step}  evaluation: top1 {scores.top1:.4f}  top5 {scores.top5:.4f}")
    return scores


def evaluate(config: ml_collections.ConfigDict, path: epath.Path, out: epath.Path | None, data: Any) -> None:
    """Evaluates a checkpoint and writes what it comes to.

    Args:
      config: of the model and the data.
      path: RUN/checkpoints/STEP, or RUN for its latest.
      out: where the files go; None writes none. RUN keeps its result.json if the data are not the run's.
      data: a `structvit_jax.data.Dataset`.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    with io_errors_as_user_error(out or path), oom_as_user_error(config):
        run = Run.prepare(config, data)
        card, where, step, weights = _restore(run, path)
        log(f"evaluating step {step} of {where.parent.parent} on {describe_test(data)}")
        changed = differences(card["config"], as_json(config))
        for line in changed:
            log(f"note: {line}")
        evaluation = Evaluator(run.model, config, run.mesh, data)(weights)
        result = make_result(run, evaluation.summary(), step, weights)
        log(describe(result))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            unreadable = Unreadable(out, data.train_examples, config.data.max_unreadable_fraction)
            unreadable.note("test", evaluation.problems)
            unreadable.exchange()
            other = out == where.parent.parent and _is_other_data(changed, card, data)
            if other:
                log(f"on other data than the run's: {out / 'result.json'} stays; see result_other.json")
            write_result(out, result, evaluation, data, "_other" * other)


@rereading
def _restore(run: Run, path: epath.Path) -> tuple[dict[str, Any], epath.Path, int, Weights]:
    """Return the card, the folder, the step and the weights of a checkpoint; the data adopt its classes."""
    with open_checkpoint(str(path)) as (checkpoints, step):
        card = checkpoints.card(step)
        adopt_classes(run.data, card)
        advice, like = "configure the model that was saved", split(run.model)[1]
        weights = checkpoints.weights(step, like, run.mesh, advice, averaged=run.config.eval.ema)
        return card, checkpoints.path(step), step, weights


def _is_other_data(changed: list[str], card: dict[str, Any], data: Any) -> bool:
    """Return whether changed keys or changed test data make a score incomparable with the run's own."""
    indifferent = _INDIFFERENT
    if fingerprint := card.get("data"):
        indifferent += _PLACES
        changes = processes.broadcast_from_primary(lambda: data.changes_since(fingerprint, test_only=True))
        if not changes.same:
            return True
    keys = ("config.data.", "config.eval.average")
    return any(line.startswith(keys) and not line.startswith(indifferent) for line in changed)


def make_result(run: Run, scores: Scores, step: int, weights: Weights) -> dict[str, Any]:
    """What result.json holds."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(run.mesh))(weights)
    return scores._asdict() | {"step": step, "params_sha256": sha256(whole)}


def write_result(
    workdir: epath.Path, result: dict[str, Any], evaluation: Evaluation, data: Any, suffix: str = ""
) -> None:
    """Writes result.json and predictions.npz, in one process."""
    if processes.is_primary():
        evaluation.save(workdir / PREDICTIONS.replace(".", f"{suffix}."), data.class_names)
        write_json(workdir / RESULT.replace(".", f"{suffix}."), result)


def describe_test(data: Any) -> str:
    """The test split in words."""
    views = f", {data.views} views each" if data.views > 1 else ""
    return f"{data.test_examples} {data.unit}{views}"


def read_result(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The run's result, if there is a whole one and it is that of `step`."""
    try:
        result = read_json(workdir / RESULT) or {}
        describe(result)
        return result if result["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(result: dict[str, Any]) -> str:
    """A result in one line."""
    return (
        f"result: top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  mean_class {result['mean_class']:.4f}"
        f"  on {result['examples']} examples"
        + (f", {result['missing']} missing" if result["missing"] else "")
        + f"  step {result['step']}  params_sha256 {result['params_sha256'][:12]}"
    )
