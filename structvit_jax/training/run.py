"""What a configuration makes of the data, and where a run starts."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

import structvit_jax
from structvit_jax.config import Durations, durations, model_arguments
from structvit_jax.models import Network, create_model
from structvit_jax.models.weights import split
from structvit_jax.training import optim
from structvit_jax.training.checkpoint import Checkpoints, Keep, load_weights
from structvit_jax.training.mesh import check_batch, describe_devices, make_mesh
from structvit_jax.training.placement import abstract
from structvit_jax.training.processes import say
from structvit_jax.training.profile import steps_to_profile
from structvit_jax.training.step import TrainState, fresh_state, init_state, normalize


@dataclasses.dataclass(frozen=True)
class Run:
    """The model and the mesh that it lives on, the optimizer, and the durations in steps."""

    config: ml_collections.ConfigDict
    data: Any  # a structvit_jax.data.Dataset
    mesh: Mesh
    model: Network  # with fresh weights
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    durations: Durations

    @classmethod
    def prepare(cls, config: ml_collections.ConfigDict, data: Any, mesh: Mesh | None = None) -> Run:
        """Builds everything and checks that it fits together, before anything is compiled or written.

        Args:
          config, data: as for `train`.
          mesh: of other devices than this machine's, to compile for them.

        Raises:
          UserError: a model that does not take the data's shape, or batches that devices cannot share.
        """
        steps_to_profile(config.profile)
        if mesh is None:
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
            check_batch(mesh, "eval.batch_size", config.eval.batch_size)
            say(f"devices: {describe_devices()}; mesh {dict(mesh.shape)}")

        classes = len(data.class_names)
        model = create_model(**model_arguments(config), num_classes=classes, seed=config.train.seed)
        example = jax.ShapeDtypeStruct((1, *data.shape), jnp.uint8)
        jax.eval_shape(lambda x: model(normalize(x, config)), example)
        parameters = sum(array.size for array in split(model)[1].params.values())
        say(f"model: {config.model.name}, {parameters:,} parameters, {classes} classes")

        steps = durations(config, data.rows_per_epoch)
        schedule = optim.learning_rate(config.optimizer, steps)
        optimizer = optim.make_optimizer(config.optimizer)
        return cls(config, data, mesh, model, schedule, optimizer, steps)

    def card(self) -> dict[str, Any]:
        """What a checkpoint of this run says of itself."""
        return {
            "class_names": list(self.data.class_names),
            "config": as_json(self.config),
            "version": structvit_jax.__version__,
        }


def keep(run: Run) -> Keep:
    """Which checkpoints of a run stay."""
    options = run.config.checkpoint
    return Keep(options.keep, options.keep_best, run.durations.keep_every)


def abstract_state(run: Run) -> TrainState:
    """Shapes and places of the state of a run, of which nothing is computed."""
    weights = split(run.model)[1]
    return abstract(jax.eval_shape(functools.partial(fresh_state, run.optimizer), weights), run.mesh)


def starting_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The latest checkpoint's state; without one, fresh or taken from config.init_from.

    Raises:
      UserError: a checkpoint of another model, or none where init_from points.
    """
    latest, init_from = checkpoints.latest(), run.config.init_from
    if latest is not None:
        say(f"resuming from {checkpoints.path(latest)}")
        card = checkpoints.card(latest)
        adopt_classes(run.data, card)
        advice = "choose another --workdir, or the model that was saved"
        state = checkpoints.state(latest, abstract_state(run), run.mesh, advice)
        for line in differences(card["config"], as_json(run.config)):
            say(f"note: {line}")
        return state
    state = init_state(split(run.model)[1], run.optimizer, run.mesh)
    if init_from:
        say(f"starting from the weights of {init_from}")
        return state._replace(weights=load_weights(init_from, state.weights, run.mesh))
    say("starting from scratch")
    return state


def adopt_classes(data: Any, card: dict[str, Any]) -> None:
    """Numbers the labels of the data as the model of a checkpoint does, by name.

    Raises:
      UserError: the names differ.
    """
    if data.adopt_classes(card["class_names"]):
        say("note: the data order their classes unlike the checkpoint; labels follow it by name")


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration in plain types."""
    return json.loads(config.to_json_best_effort())


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
