"""Train a configuration, from its workdir to its result. Read it beside `structvit_jax.training.step`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import ml_collections
from etils import epath

from structvit_jax.config import durations
from structvit_jax.data.types import Dataset
from structvit_jax.runtime import processes, signals
from structvit_jax.runtime.device_clock import DeviceClock
from structvit_jax.runtime.goodput import Goodput
from structvit_jax.runtime.lock import WorkdirLock
from structvit_jax.runtime.mesh import put_batch
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.profile import Profile, steps_to_profile
from structvit_jax.runtime.storage import CONFIG, io_errors_as_user_error, write_json
from structvit_jax.training.card import as_json, make_card
from structvit_jax.training.checkpoint import FOLDER, Checkpoints, RetentionPolicy
from structvit_jax.training.evaluation import (
    Evaluation,
    Result,
    Scores,
    describe_result,
    describe_test,
    eval_runner,
    evaluate,
    make_result,
    read_result,
    write_result,
)
from structvit_jax.training.forecast import Forecast
from structvit_jax.training.learner import Learner, check_train_batch, compile_train_step, oom_as_user_error
from structvit_jax.training.log import RunLog, Unreadable
from structvit_jax.training.start import starting_state
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import Stopped, UserError

# An evaluation is skipped if the final one follows within this fraction of config.eval.every.
_MIN_INTERVAL = 0.1


def train(
    config: ml_collections.ConfigDict, workdir: epath.Path, data: Dataset, *, profile: str = ""
) -> Result:
    """Train for the configured duration or resume training, evaluate, and return the result.

    Args:
      config: see `structvit_jax.config`.
      workdir: for checkpoints, metrics and the result; a run in it is resumed.
      data: see `structvit_jax.data.load`.
      profile: steps to profile, such as "10:20" (START:STOP), into WORKDIR/profile; "" profiles none.

    Raises:
      UserError: the configuration, a checkpoint or the workdir cannot be used.
      Stopped: a signal stopped the run; the state is saved.
    """
    started, profiled = time.monotonic(), steps_to_profile(profile)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopSignal())
        stack.enter_context(oom_as_user_error(config))

        # Build the model, the optimizer and the mesh, and check that they fit before anything is written.
        learner = Learner.create(config, data)
        steps = durations(config, data.rows_per_epoch)
        total = steps.total

        # Open the workdir.
        lock = stack.enter_context(_locked(workdir))
        policy = RetentionPolicy(config.checkpoint.keep, config.checkpoint.keep_best, steps.keep_every)
        checkpoints = stack.enter_context(Checkpoints(workdir, policy))
        unreadable = Unreadable(workdir, data.train_examples, config.data.max_unreadable_fraction)
        goodput = Goodput(workdir, started)

        # Restore the latest checkpoint, or start from initial weights.
        goodput.switch("restore")
        state = starting_state(learner, data, checkpoints, total)
        start = int(state.step)
        goodput.resume(start)
        if start < total:
            check_train_batch(learner)
            if processes.is_primary():
                write_json(workdir / CONFIG, as_json(config))
        else:
            advice = "to train longer, raise --config.train.duration"
            log(f"the run is complete: step {start} of {total}; {advice}")
            if result := processes.broadcast_from_primary(lambda: read_result(workdir, start)):
                log(describe_result(result))
                return result

        run_log = stack.enter_context(RunLog(workdir, start, total, config, data, goodput, lock.check))
        stack.callback(lambda: log(goodput.describe()))
        runner = eval_runner(learner)

        def evaluate_state(
            state: TrainState, before: Callable[[int], None] = lambda batch: None
        ) -> Evaluation:
            run_log.flush()
            goodput.switch("evaluate")
            evaluation = evaluate(runner, state.eval_weights(config.eval.ema), data, config.eval, before)
            unreadable.note("test", evaluation.problems)
            unreadable.exchange()
            return evaluation

        def save(state: TrainState, scores: Scores | None = None) -> None:
            lock.check()
            unreadable.exchange()
            run_log.flush()
            goodput.switch("save")
            goodput.saved(int(state.step))
            run_log.write()
            checkpoints.save(state, make_card(data.class_names, config, scores, data.fingerprint), scores)
            run_log.restart_clock()

        # Train. Resuming is exact because of this order: step, log, evaluate, write the logs, save. So if
        # there is a checkpoint of step n, metrics.jsonl has all lines up to n. Resuming drops later lines.
        if start < total:
            if line := data.start_cache():
                log(line)
            goodput.switch("compile")
            train_step = compile_train_step(learner, state)
            forecast = Forecast(learner, train_step, state, total - start)
            run_log.restart_clock()
            devices = stack.enter_context(contextlib.closing(DeviceClock()))
            shard, saved = processes.process_shard(), start
            stream = data.train_batches(config.data.batch_size, start_step=start, shard=shard)
            with contextlib.closing(stream) as batches, Profile(profiled, workdir, start) as profiler:
                for step in range(start + 1, total + 1):
                    if stop.before(step):
                        if saved < step - 1:
                            save(state)
                        phase = f"after step {step - 1} of {total}"
                        raise Stopped(f"stopped by a signal {phase}; re-run the command to resume")

                    goodput.switch("input")
                    requested = time.monotonic()
                    rows = next(batches)
                    unreadable.note("train", rows["problems"])
                    if step == start + 1 and (expected := forecast.describe(rows)):
                        log(expected)
                    batch = put_batch(learner.mesh, rows)
                    waited = devices.idle(since=requested)

                    goodput.switch("step", overlap=time.monotonic() - requested - waited)
                    profiler.before(step, state)
                    state, metrics = train_step(state, batch)
                    devices.dispatched(metrics)
                    run_log.step(step, metrics, waited, rows["seconds"])

                    scores = None
                    if evaluation_due(step, steps.eval_every, total):
                        scores = _log_evaluation(step, evaluate_state(state), run_log)
                    due = any(every and step % every == 0 for every in (steps.save_every, steps.keep_every))
                    ranked = scores is not None and config.checkpoint.keep_best
                    if step == total or due or ranked:
                        save(state, scores)
                        saved = step

        # Evaluate, and write the result. A signal may interrupt this, because the state is already saved.
        def stop_evaluation(batch: int) -> None:
            # StopSignal needs increasing numbers: count the batches as steps after the last one.
            if stop.before(total + 1 + batch):
                phase = f"in the evaluation after step {total}"
                raise Stopped(f"stopped by a signal {phase}; re-run the command to evaluate")

        log(f"evaluating {describe_test(data)}")
        evaluation = evaluate_state(state, stop_evaluation)
        step, scores = int(state.step), evaluation.summary()
        run_log.evaluation(step, scores)
        result = make_result(learner.mesh, scores, step, state.eval_weights(config.eval.ema))
        lock.check()
        write_result(workdir, result, evaluation, data)
    log(describe_result(result))
    return result


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[WorkdirLock]:
    """Create the workdir if needed, and lock it.

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
        processes.barrier()  # the other processes read the workdir once it exists and is locked
        yield lock


def evaluation_due(step: int, every: int, total: int) -> bool:
    """Return whether to evaluate after a step.

    Evaluations are due at multiples of `every` (0 means never), but not at or shortly before the last step
    `total`, because the final evaluation follows that step.
    """
    return every > 0 and step % every == 0 and total - step >= _MIN_INTERVAL * every


def _log_evaluation(step: int, evaluation: Evaluation, run_log: RunLog) -> Scores | None:
    """Log a mid-training evaluation and return its scores.

    If too many examples are unreadable, log the reason and return None. Training continues.
    """
    try:
        scores = evaluation.summary()
    except UserError as error:
        log(f"step {step}  evaluation: {error}")
        run_log.restart_clock()
        return None
    run_log.evaluation(step, scores)
    log(f"step {step}  evaluation: top1 {scores['top1']:.4f}  top5 {scores['top5']:.4f}")
    return scores
