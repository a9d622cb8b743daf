"""A run from its first line to its result: `train` and `evaluate_run` are what `main` calls."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import ml_collections
from etils import epath

from structvit_jax.errors import UserError
from structvit_jax.models.weights import Weights, sha256, split
from structvit_jax.training.checkpoint import FOLDER, Checkpoints
from structvit_jax.training.evaluation import Evaluation, Evaluator, Scores
from structvit_jax.training.log import RunLog, say, write_json
from structvit_jax.training.mesh import check_batch, own_share, put_batch
from structvit_jax.training.run import Run, adopt_classes, as_json, differences, starting_state
from structvit_jax.training.step import TrainState, make_train_step
from structvit_jax.training.unreadable import Unreadable

# Keys of the data that change no score.
_INDIFFERENT = tuple(f"config.data.{key} " for key in ("batch_size", "workers", "max_bad_share"))


def train(config: ml_collections.ConfigDict, workdir: epath.Path, data: Any) -> dict[str, Any]:
    """Trains, or goes on training, until the configured duration; evaluates; returns the result.

    Args:
      config: see `structvit_jax.config`.
      workdir: where checkpoints, metrics and result live; a run in it is resumed.
      data: a `structvit_jax.data.Dataset`.

    Raises:
      UserError: a configuration, checkpoint or workdir that does not fit.
    """
    run = Run.prepare(config, data)
    with open_workdir(workdir, keep=config.checkpoint.keep) as checkpoints:
        state = starting_state(run, checkpoints)
        unreadable = Unreadable(workdir, data.train_examples, config.data.max_bad_share)
        start, total = int(state.step), run.durations.total
        if start >= total:
            say(f"the run is complete: step {start} of {total}; --config.train.duration sets more")
            if result := read_result(workdir, start):
                say(describe(result))
                return result
        else:
            check_batch(run.mesh, "data.batch_size", config.data.batch_size)
            write_json(workdir / "config.json", as_json(config))
        evaluator = Evaluator(run.model, config, run.mesh, data)
        with RunLog(workdir, start, total, config.data.batch_size, data.unit) as log:
            state = take_steps(run, state, checkpoints, evaluator, log, unreadable)
            say(f"evaluating {describe_test(data)}")
            evaluation = evaluator(state.weights)
            unreadable.note("test", evaluation.problems)
            scores = evaluation.summary()
            log.evaluation(int(state.step), scores._asdict())
    result = make_result(scores, int(state.step), state.weights)
    write_result(workdir, result, evaluation, data)
    say(describe(result))
    return result


def take_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    log: RunLog,
    unreadable: Unreadable,
) -> TrainState:
    """All steps that are left.

    The order is what makes resuming exact: step, log, evaluate, flush, save. A checkpoint of step n
    implies that every line up to n is in metrics.jsonl, and what follows is dropped on resuming.
    """
    start, (total, _, eval_every, save_every), card = int(state.step), run.durations, run.card()
    step_fn: Callable | None = None
    stream = run.data.train_batches(run.config.data.batch_size, start_step=start, share=own_share())
    with contextlib.closing(stream) as batches:
        for step in range(start + 1, total + 1):
            asked = time.monotonic()
            rows = next(batches)
            unreadable.note("train", rows["problems"])
            batch = put_batch(run.mesh, rows)
            waited = time.monotonic() - asked
            if step_fn is None:
                step_fn, waited = compiled_step(run, state, batch), 0.0
                log.restart_clock()
            state, metrics = step_fn(state, batch)
            log.step(step, metrics, waited)
            if eval_every and step % eval_every == 0 and step < total:
                evaluate_on_the_way(step, evaluator(state.weights), log, unreadable)
            if step == total or (save_every and step % save_every == 0):
                log.flush()
                checkpoints.save(state, card)
                log.restart_clock()
    return state


def evaluate_on_the_way(step: int, evaluation: Evaluation, log: RunLog, unreadable: Unreadable) -> None:
    """Tells an evaluation during training; one that has no score stops nothing."""
    unreadable.note("test", evaluation.problems)
    try:
        scores = evaluation.summary()
    except UserError as error:
        say(f"step {step}  evaluation: {error}")
        log.restart_clock()
        return
    log.evaluation(step, scores._asdict())
    say(f"step {step}  evaluation: top1 {scores.top1:.4f}  top5 {scores.top5:.4f}")


def compiled_step(run: Run, state: TrainState, batch: dict[str, Any]) -> Callable:
    """The train step, compiled ahead of its first call so that the wait has a name."""
    say("compiling the train step ...")
    started = time.monotonic()
    step_fn = make_train_step(run.model, run.optimizer, run.schedule, run.config, run.mesh, state)
    compiled = step_fn.lower(state, batch).compile()
    say(f"compiled in {time.monotonic() - started:.1f} s")
    return compiled


def evaluate_run(config: ml_collections.ConfigDict, workdir: epath.Path, data: Any) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run and writes its result.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    run = Run.prepare(config, data)
    if not (workdir / FOLDER).exists():
        raise UserError(f"no checkpoint in {workdir}: train first, or name the --workdir of a run")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"no finished checkpoint in {workdir / FOLDER}: train first")
        advice = "configure the model that was saved"
        card = checkpoints.card(step)
        adopt_classes(data, card)
        weights = checkpoints.weights(step, split(run.model)[1], run.mesh, advice)
    changed = differences(card["config"], as_json(config))
    say(f"evaluating step {step} of {workdir} on {describe_test(data)}")
    for line in changed:
        say(f"note: {line}")
    evaluation = Evaluator(run.model, config, run.mesh, data)(weights)
    unreadable = Unreadable(workdir, data.train_examples, config.data.max_bad_share)
    unreadable.note("test", evaluation.problems)
    result = make_result(evaluation.summary(), step, weights)
    say(describe(result))
    changed_data = [line for line in changed if line.startswith(("config.data.", "config.eval.average"))]
    own = all(line.startswith(_INDIFFERENT) for line in changed_data)
    if not own:
        say(f"on other data than the run's: {workdir / 'result.json'} stays as it is; see result_other.json")
    write_result(workdir, result, evaluation, data, "" if own else "_other")
    return result


def open_workdir(workdir: epath.Path, *, keep: int) -> Checkpoints:
    """Makes the workdir where there is none, and opens its checkpoints."""
    try:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        return Checkpoints(workdir, keep=keep)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"workdir {workdir} cannot be used: {reason}; choose another --workdir") from error


def make_result(scores: Scores, step: int, weights: Weights) -> dict[str, Any]:
    return scores._asdict() | {"step": step, "params_sha256": sha256(weights)}


def write_result(
    workdir: epath.Path, result: dict[str, Any], evaluation: Evaluation, data: Any, suffix: str = ""
) -> None:
    evaluation.save(workdir / f"predictions{suffix}.npz", data.class_names)
    write_json(workdir / f"result{suffix}.json", result)


def describe_test(data: Any) -> str:
    views = f", {data.views} views each" if data.views > 1 else ""
    return f"{data.test_examples} {data.unit}{views}"


def read_result(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The run's result, if there is a whole one and it is that of `step`."""
    try:
        result = json.loads((workdir / "result.json").read_text())
        describe(result)
        return result if result["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(result: dict[str, Any]) -> str:
    return (
        f"result: top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  mean_class {result['mean_class']:.4f}"
        f"  on {result['examples']} examples"
        + (f", {result['missing']} missing" if result["missing"] else "")
        + f"  step {result['step']}  params_sha256 {result['params_sha256'][:12]}"
    )
