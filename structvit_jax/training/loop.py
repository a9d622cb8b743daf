"""A run from its first line to its result: `train` and `evaluate_run` are what `main` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from jax.sharding import Mesh

import structvit_jax
from structvit_jax.config import Clock, model_arguments
from structvit_jax.errors import UserError
from structvit_jax.models import Network, create_model
from structvit_jax.models.weights import Weights, sha256, split
from structvit_jax.training import optim
from structvit_jax.training.checkpoint import FOLDER, Checkpoints, load_weights
from structvit_jax.training.evaluation import Scores, evaluate
from structvit_jax.training.log import RunLog, say, write_json
from structvit_jax.training.mesh import check_batch, describe_devices, make_mesh, put_batch, state_sharding
from structvit_jax.training.step import TrainState, init_state, make_eval_step, make_train_step, normalize


def train(config: ml_collections.ConfigDict, workdir: epath.Path, data: Any) -> dict[str, Any]:
    """Trains, or goes on training, until the configured duration; evaluates; returns the result.

    Args:
      config: see `structvit_jax.config`.
      workdir: where checkpoints, metrics and result live; a run in it is resumed.
      data: a `structvit_jax.data.Dataset`.

    Raises:
      UserError: a configuration, checkpoint or workdir that does not fit.
    """
    # --- What the run is -------------------------------------------------------------------------
    run = Run.prepare(config, data)
    prepare_workdir(workdir, config)
    clock = Clock(config.data.batch_size, len(data.train))
    total = clock.steps(config.train.duration, "train.duration")
    eval_every = clock.steps(config.eval.every, "eval.every")
    save_every = clock.steps(config.checkpoint.every, "checkpoint.every")
    schedule = optim.learning_rate(config.optimizer, clock, total)
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    state = init_state(run.weights, optimizer, run.mesh)

    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
        # --- Where it starts: resumed, from other weights, or from scratch -----------------------
        state = starting_state(config, checkpoints, state, run.mesh)
        start = int(state.step)
        if start >= total:
            say(f"the run is complete: step {start} of {total}; for more, raise --config.train.duration")
            if result := read_result(workdir, start):
                say(describe_result(result))
                return result
        log = RunLog(
            workdir, start_step=start, total_steps=total, batch_size=config.data.batch_size, unit=data.unit
        )
        evaluator = Evaluator(run, config, data)

        # --- The steps ---------------------------------------------------------------------------
        # The order is what makes resuming exact: step, log, evaluate, flush, save. A checkpoint of
        # step n implies that all lines up to n are in metrics.jsonl.
        card = run_card(config, data)
        step_fn = None
        with contextlib.closing(data.train_batches(config.data.batch_size, start_step=start)) as batches:
            for step in range(start + 1, total + 1):
                asked = time.monotonic()
                batch = put_batch(run.mesh, next(batches))
                waited = time.monotonic() - asked
                if step_fn is None:
                    step_fn = compiled_step(run, optimizer, schedule, config, state, batch)
                    log.restart_clock()
                state, metrics = step_fn(state, batch)
                log.step(step, metrics, waited)
                if eval_every and step % eval_every == 0 and step < total:
                    scores = evaluator(state.weights)
                    log.evaluation(step, scores._asdict())
                    say(f"step {step}/{total}  evaluation: top1 {scores.top1:.4f}  top5 {scores.top5:.4f}")
                if step == total or (save_every and step % save_every == 0):
                    log.flush()
                    checkpoints.save(state, card)
                    log.restart_clock()

        # --- The result --------------------------------------------------------------------------
        say(f"evaluating {len(data.test)} {data.unit}")
        scores = evaluator(state.weights)
        log.evaluation(total, scores._asdict())
        log.close()
    result = scores._asdict() | {"step": int(state.step), "params_sha256": sha256(state.weights)}
    write_json(workdir / "result.json", result)
    say(describe_result(result))
    return result


def evaluate_run(config: ml_collections.ConfigDict, workdir: epath.Path, data: Any) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run and writes its result.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    run = Run.prepare(config, data)
    if not (workdir / FOLDER).exists():
        raise UserError(
            f"no checkpoint in {workdir}: train first (--mode=train), or name the --workdir of a run"
        )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"no finished checkpoint in {workdir / FOLDER}: train first (--mode=train)")
        weights = checkpoints.weights(step, run.weights, run.mesh)
    say(f"evaluating step {step} of {workdir} on {len(data.test)} {data.unit}")
    scores = Evaluator(run, config, data)(weights)
    result = scores._asdict() | {"step": step, "params_sha256": sha256(weights)}
    write_json(workdir / "result.json", result)
    say(describe_result(result))
    return result


@dataclasses.dataclass(frozen=True)
class Run:
    """The model and the mesh that it lives on."""

    model: Network
    weights: Weights  # the model's fresh ones
    mesh: Mesh

    @classmethod
    def prepare(cls, config: ml_collections.ConfigDict, data: Any) -> Run:
        """Builds model and mesh and checks that they fit the data, before anything is compiled."""
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
        check_batch(mesh, "data.batch_size", config.data.batch_size)
        check_batch(mesh, "eval.batch_size", config.eval.batch_size)
        say(f"devices: {describe_devices()}; mesh {dict(mesh.shape)}")
        model = create_model(
            **model_arguments(config), num_classes=len(data.class_names), seed=config.train.seed
        )
        jax.eval_shape(
            lambda x: model(normalize(x, config)), jax.ShapeDtypeStruct((1, *data.train.shape), jnp.uint8)
        )
        weights = split(model)[1]
        millions = sum(array.size for array in weights.params.values()) / 1e6
        say(f"model: {config.model.name}, {millions:.2f} M parameters, {len(data.class_names)} classes")
        return cls(model, weights, mesh)


class Evaluator:
    """Scores weights on the test split."""

    def __init__(self, run: Run, config: ml_collections.ConfigDict, data: Any):
        self._step = make_eval_step(split(run.model)[0], config, run.mesh, run.weights)
        self._run, self._data, self._batch_size = run, data, config.eval.batch_size

    def __call__(self, weights: Weights) -> Scores:
        with contextlib.closing(self._data.test_batches(self._batch_size)) as batches:
            return evaluate(self._step, weights, batches, self._run.mesh, len(self._data.test))


def compiled_step(run, optimizer, schedule, config, state, batch):
    """The train step, compiled ahead of its first call so that the wait has a name."""
    say("compiling the train step ...")
    started = time.monotonic()
    step_fn = make_train_step(run.model, optimizer, schedule, config, run.mesh, state)
    compiled = step_fn.lower(state, batch).compile()
    say(f"compiled in {time.monotonic() - started:.1f} s")
    return compiled


def starting_state(
    config: ml_collections.ConfigDict, checkpoints: Checkpoints, state: TrainState, mesh: Mesh
) -> TrainState:
    """The latest checkpoint's state; else the weights of config.init_from; else `state` as it is."""
    latest = checkpoints.latest()
    if latest is not None:
        say(f"resuming from {checkpoints.path(latest)}")
        state = checkpoints.state(latest, state, mesh)
        for line in differences(checkpoints.card(latest)["config"], json.loads(config.to_json_best_effort())):
            say(f"note: {line}")
        return state
    if config.init_from:
        say(f"starting from the weights of {config.init_from}")
        weights = load_weights(config.init_from, state.weights, mesh)
        return state._replace(weights=jax.device_put(weights, state_sharding(mesh, weights)))
    say("starting from scratch")
    return state


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> list[str]:
    """What changed between two configurations, a line each."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}.{key}")
        elif before != after:
            lines.append(f"{prefix}.{key} is now {after!r}; the checkpoint was trained with {before!r}")
    return lines


def run_card(config: ml_collections.ConfigDict, data: Any) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "model": model_arguments(config),
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "config": json.loads(config.to_json_best_effort()),
        "version": structvit_jax.__version__,
    }


def prepare_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir and writes the configuration into it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be used: {error.strerror or error}; choose another --workdir"
        ) from error


def read_result(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The run's result, if it is that of `step`."""
    path = workdir / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["step"] == step else None


def describe_result(result: dict[str, Any]) -> str:
    return (
        f"result: top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  on {result['examples']} examples"
        f"  step {result['step']}  params_sha256 {result['params_sha256'][:12]}"
    )
