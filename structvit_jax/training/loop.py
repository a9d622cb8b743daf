"""Training and evaluation of a run, from its configuration to its result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import ml_collections
from etils import epath

from structvit_jax.config import Durations, durations
from structvit_jax.data.types import Dataset
from structvit_jax.models.weights import Weights, split
from structvit_jax.runtime import processes, signals
from structvit_jax.runtime.goodput import Goodput
from structvit_jax.runtime.lock import WorkdirLock
from structvit_jax.runtime.mesh import put_batch
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.profile import Profile, steps_to_profile
from structvit_jax.runtime.storage import CONFIG, RESULT, io_errors_as_user_error, write_json
from structvit_jax.training.card import as_json, differences, make_card
from structvit_jax.training.checkpoint import Checkpoints, RetentionPolicy
from structvit_jax.training.commit import FOLDER
from structvit_jax.training.compatibility import adopt_classes, same_test_data
from structvit_jax.training.compilation import compile_train_step, oom_as_user_error
from structvit_jax.training.evaluation import Evaluation, Scores, StepRunner
from structvit_jax.training.evaluation import evaluate as evaluate_weights
from structvit_jax.training.learner import Learner, check_train_batch
from structvit_jax.training.log import RunLog
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.result import (
    Result,
    describe,
    describe_test,
    make_result,
    read_result,
    write_result,
)
from structvit_jax.training.start import starting_state
from structvit_jax.training.step import TrainState, make_eval_step
from structvit_jax.training.unreadable import Unreadable
from structvit_jax.utils.errors import Stopped, UserError

_LEAST_INTERVAL = 0.1  # of config.eval.every, between an evaluation and the final one
# Keys of the section `data` that do not affect scores.
_WITHOUT_EFFECT = {"batch_size", "workers", "max_unreadable_fraction", "max_pixels", "max_frames"}
# Keys of the section `data` that select the data; a fingerprint identifies these better.
_LOCATION = {"name", "root", "train_split", "test_split", "val_fraction", "train_examples", "test_examples"}
_LOCATION |= {"label_maps"}


def train(
    config: ml_collections.ConfigDict, workdir: epath.Path, data: Dataset, *, profile: str = ""
) -> Result:
    """Train, or resume training, for the configured duration; evaluate; return the result.

    Args:
      config: see `structvit_jax.config`.
      workdir: for checkpoints, metrics and the result; a run in it is resumed.
      data: see `structvit_jax.data.load`.
      profile: steps to profile into WORKDIR/profile, as "START:STOP"; "" is none.

    Raises:
      UserError: a configuration, checkpoint or workdir that cannot be used.
      Stopped: a signal stopped the run; the state is saved.
    """
    started, profiled = time.monotonic(), steps_to_profile(profile)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopSignal())
        stack.enter_context(oom_as_user_error(config))

        # Resolve: build model, optimizer and mesh, and check that they fit before anything is written.
        learner = Learner.create(config, data)
        steps = durations(config, data.rows_per_epoch)

        # Open the workdir.
        files = stack.enter_context(open_workdir(workdir, config, data, steps.keep_every))
        goodput = Goodput(workdir, started)

        # Restore the latest checkpoint, or start.
        goodput.switch("restore")
        state = starting_state(learner, data, files.checkpoints, steps.total)
        start = int(state.step)
        goodput.resume(start)
        if start < steps.total:
            check_train_batch(learner)
            if processes.is_primary():
                write_json(workdir / CONFIG, as_json(config))
        else:
            log(f"the run is complete: step {start} of {steps.total}; --config.train.duration sets more")
            if result := processes.broadcast_from_primary(lambda: read_result(workdir, start)):
                log(describe(result))
                return result

        evaluate_state = functools.partial(_evaluate_state, eval_runner(learner), config, data)
        with RunLog(workdir, start, steps.total, config, data, goodput, files.lock.check) as run_log:
            try:
                if start < steps.total:
                    # Compile the train step, then take the steps.
                    goodput.switch("compile")
                    step_fn = compile_train_step(learner, state)
                    run_log.restart_clock()
                    with Profile(profiled, workdir, start) as profiler:
                        state = _take_steps(
                            step_fn, state, learner, data, steps, files, run_log, profiler, stop,
                            evaluate_state,
                        )  # fmt: skip

                # Evaluate.
                log(f"evaluating {describe_test(data)}")
                goodput.switch("evaluate")
                evaluation = evaluate_state(state, lambda batch: _stop_evaluation(stop, steps.total, batch))
                files.unreadable.note("test", evaluation.problems)
                files.unreadable.exchange()
                scores = evaluation.summary()
                run_log.evaluation(int(state.step), scores._asdict())
            finally:
                log(goodput.describe())

        # Write the result.
        result = make_result(learner.mesh, scores, int(state.step), state.scored(config.eval.ema))
        files.lock.check()
        write_result(workdir, result, evaluation, data)
        log(describe(result))
        return result


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A locked workdir."""

    lock: WorkdirLock
    checkpoints: Checkpoints
    unreadable: Unreadable


@contextlib.contextmanager
def open_workdir(
    workdir: epath.Path, config: ml_collections.ConfigDict, data: Dataset, keep_every: int
) -> Iterator[Workdir]:
    """Create the workdir if needed, lock it, and open its checkpoints.

    Args:
      workdir: the folder.
      config: its sections checkpoint and data.
      data: of the run.
      keep_every: multiples of so many steps are kept; 0 is none.

    Raises:
      UserError: it cannot be used, or another run uses it.
    """
    lock, options = WorkdirLock(workdir), config.checkpoint
    with contextlib.ExitStack() as stack:
        stack.enter_context(io_errors_as_user_error(workdir))
        if processes.is_primary():
            (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
            stack.enter_context(signals.LISTENER.cleanup(lock.release))
            stack.enter_context(lock)
        processes.barrier()  # the other processes read it once it exists and is locked
        policy = RetentionPolicy(options.keep, options.keep_best, keep_every)
        checkpoints = stack.enter_context(Checkpoints(workdir, policy))
        unreadable = Unreadable(workdir, data.train_examples, config.data.max_unreadable_fraction)
        yield Workdir(lock, checkpoints, unreadable)


def _take_steps(
    step_fn: jax.stages.Compiled,
    state: TrainState,
    learner: Learner,
    data: Dataset,
    steps: Durations,
    files: Workdir,
    run_log: RunLog,
    profiler: Profile,
    stop: processes.StopSignal,
    evaluate_state: Callable[[TrainState], Evaluation],
) -> TrainState:
    """Take all remaining steps.

    The order makes resuming exact: step, log, evaluate, write, save. A checkpoint of step n implies that
    every line up to n is in metrics.jsonl, and later lines are dropped on resuming.
    """
    config, goodput, start = learner.config, run_log.goodput, int(state.step)

    def save(scores: Mapping[str, float] | None = None) -> None:
        files.lock.check()
        files.unreadable.exchange()
        run_log.flush()
        goodput.switch("save")
        goodput.saved(int(state.step))
        run_log.write()
        card = make_card(data.class_names, config, scores, data.fingerprint)
        files.checkpoints.save(state, card, scores)
        run_log.restart_clock()

    stream = data.train_batches(config.data.batch_size, start_step=start, shard=processes.process_shard())
    with contextlib.closing(stream) as batches:
        saved = start
        for step in range(start + 1, steps.total + 1):
            if stop.before(step):
                if saved < step - 1:
                    save()
                done = f"{step - 1} of {steps.total}"
                raise Stopped(f"stopped by a signal after step {done}; re-run the command to resume")
            goodput.switch("input")
            requested = time.monotonic()
            rows = next(batches)
            files.unreadable.note("train", rows["problems"])
            batch = put_batch(learner.mesh, rows)
            waited = time.monotonic() - requested
            goodput.switch("step")
            profiler.before(step, state)
            state, metrics = step_fn(state, batch)
            run_log.step(step, metrics, waited)
            scores = None
            if evaluation_due(step, steps.eval_every, steps.total):
                run_log.flush()
                goodput.switch("evaluate")
                scores = _log_evaluation(step, evaluate_state(state), run_log, files.unreadable)
            due = any(every and step % every == 0 for every in (steps.save_every, steps.keep_every))
            ranked = scores is not None and config.checkpoint.keep_best
            if step == steps.total or due or ranked:
                save(scores._asdict() if scores else None)
                saved = step
    return state


def evaluation_due(step: int, every: int, total: int) -> bool:
    """Return whether to evaluate after a step.

    This is at multiples of `every` (0 is never), but not shortly before step `total`, which the final
    evaluation follows.
    """
    return every > 0 and step % every == 0 and total - step >= _LEAST_INTERVAL * every


def _log_evaluation(
    step: int, evaluation: Evaluation, run_log: RunLog, unreadable: Unreadable
) -> Scores | None:
    """Log a mid-training evaluation; a failed one does not stop training."""
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


def _stop_evaluation(stop: processes.StopSignal, total: int, batch: int) -> None:
    """Stop the final evaluation if a signal asks for it; the training state is saved already."""
    if stop.before(total + 1 + batch):
        raise Stopped(
            f"stopped by a signal in the evaluation after step {total}; re-run the command to evaluate"
        )


def eval_runner(learner: Learner) -> StepRunner:
    """Return the evaluation step of a model, not compiled yet."""
    structure, weights = split(learner.model)
    return StepRunner(make_eval_step(structure, learner.config, learner.mesh, weights), learner.mesh)


def _evaluate_state(
    runner: StepRunner,
    config: ml_collections.ConfigDict,
    data: Dataset,
    state: TrainState,
    before: Callable[[int], None] = lambda batch: None,
) -> Evaluation:
    return evaluate_weights(runner, state.scored(config.eval.ema), data, config.eval, before)


def evaluate(
    config: ml_collections.ConfigDict, path: epath.Path, out: epath.Path | None, data: Dataset
) -> None:
    """Evaluate a checkpoint, log the result and write its files.

    Args:
      config: of the model and the data.
      path: RUN/checkpoints/STEP, or RUN for its latest.
      out: folder for the files; None writes none. If it is RUN and the data are not those of the run, its
        result.json is kept, and result_other.json is written.
      data: see `structvit_jax.data.load`.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    with io_errors_as_user_error(out or path), oom_as_user_error(config):
        learner = Learner.create(config, data)
        checkpoint = _restore(learner, data, path)
        log(f"evaluating step {checkpoint.step} of {checkpoint.run} on {describe_test(data)}")
        for difference in differences(checkpoint.card["config"], as_json(config)):
            log(f"note: {difference.describe()}")
        evaluation = evaluate_weights(eval_runner(learner), checkpoint.weights, data, config.eval)
        result = make_result(learner.mesh, evaluation.summary(), checkpoint.step, checkpoint.weights)
        log(describe(result))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            unreadable = Unreadable(out, data.train_examples, config.data.max_unreadable_fraction)
            unreadable.note("test", evaluation.problems)
            unreadable.exchange()
            other = out == checkpoint.run and not _is_comparable(checkpoint.card, config, data)
            if other:
                log(f"these are not the data of the run: {out / RESULT} is kept; see result_other.json")
            write_result(out, result, evaluation, data, "_other" * other)


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to evaluate."""

    run: epath.Path
    step: int
    card: dict
    weights: Weights


@rereading
def _restore(learner: Learner, data: Dataset, path: epath.Path) -> _Checkpoint:
    """Restore a checkpoint, and number the labels of the data as its classes."""
    with open_checkpoint(str(path)) as (checkpoints, step):
        card = checkpoints.card(step)
        adopt_classes(data, card)
        like, averaged = split(learner.model)[1], learner.config.eval.ema
        advice = "configure the model that was saved"
        weights = checkpoints.weights(step, like, learner.mesh, advice, averaged=averaged)
        return _Checkpoint(checkpoints.path(step).parent.parent, step, card, weights)


def _is_comparable(card: Mapping, config: ml_collections.ConfigDict, data: Dataset) -> bool:
    """Return whether scores on these data, read in this way, are comparable with those of the run."""
    ignored = _WITHOUT_EFFECT
    if card.get("data"):
        ignored = ignored | _LOCATION
        if not same_test_data(data, card):
            return False
    keys = (difference.key for difference in differences(card["config"], as_json(config)))
    relevant = {f"data.{key}" for key in config.data if key not in ignored} | {"eval.average"}
    return relevant.isdisjoint(keys)
