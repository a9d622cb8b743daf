"""What a configuration makes of the data, and where a run starts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from etils import epath
from jax.sharding import Mesh

import structvit_jax
from structvit_jax.config import Durations, durations, model_arguments, short
from structvit_jax.models import Network, create_model
from structvit_jax.models.weights import split
from structvit_jax.ops.kernels import native
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import check_batch, describe_devices, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.sharding import abstract
from structvit_jax.training import optim
from structvit_jax.training.card import is_portable
from structvit_jax.training.checkpoint import RetentionPolicy
from structvit_jax.training.step import TrainState, fresh_state, normalize
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """The model and the mesh that it lives on, the optimizer, and the durations in steps."""

    config: ml_collections.ConfigDict
    data: Any  # a structvit_jax.data.Dataset
    mesh: Mesh
    model: Network  # with fresh weights
    schedule: optax.Schedule
    optimizer: optim.Optimizer
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
        if mesh is None:
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
            check_batch(mesh, "eval.batch_size", config.eval.batch_size)
            log(f"devices: {describe_devices()}; mesh {dict(mesh.shape)}")
            if jax.default_backend() == "cpu" and not native.available():
                log("note: no C++ compiler here (c++, or what CXX names); operations take slower forms")

        classes = len(data.class_names)
        model = create_model(**model_arguments(config), num_classes=classes, seed=config.train.seed)
        example = jax.ShapeDtypeStruct((1, *data.shape), jnp.uint8)
        jax.eval_shape(lambda x: model(normalize(x, config)), example)
        _check_token_labels(config)
        params = split(model)[1].params
        optimizer = optim.make_optimizer(config.optimizer, params, model.variant.depths)
        frozen = sum(params[name].size for name in optimizer.frozen)
        log(
            f"model: {config.model.name}, {sum(array.size for array in params.values()):,} parameters"
            f"{f' ({frozen:,} of them frozen)' * bool(frozen)}, {classes} classes"
        )
        steps = durations(config, data.rows_per_epoch)
        schedule = optim.learning_rate(config.optimizer, steps)
        return cls(config, data, mesh, model, schedule, optimizer, steps)

    @property
    def averages(self) -> bool:
        """Whether it keeps a moving average of the weights."""
        return self.config.optimizer.ema > 0

    def card(self, scores: dict[str, float] | None = None) -> dict[str, Any]:
        """What a checkpoint of this run says of itself, with the scores of its evaluation if it had one."""
        return make_card(self.data.class_names, self.config, scores, self.data.fingerprint)


def _check_token_labels(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for token labelling with half of what it needs."""
    for key in ("data.label_maps", "augment.mix_token"):
        section, name = key.split(".")
        if config[section][name] and not config.model.token_labels:
            raise UserError(f"config.{key} is for token labelling; set --config.model.token_labels as well")
    if config.data.label_maps and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            "config.data.label_maps: mixup and cutmix do not mix maps; set --config.augment.mixup=0"
            " --config.augment.cutmix=0, and --config.augment.mix_token=1 in their place"
        )


def warn_of_single_examples(run: Run) -> None:
    """Log a warning if each training step normalises one example: batch statistics then subtract from its
    features the very mean that the head would read."""
    config = run.config
    if run.model.variant.network == "uniformer" and config.data.batch_size == config.train.grad_accum_steps:
        log(
            "warning: each training step normalises a single example (config.data.batch_size /"
            " config.train.grad_accum_steps is 1): in training mode the logits of this model are then the same for"
            " every input. Use at least two examples"
        )


def retention_policy(run: Run) -> RetentionPolicy:
    """Which checkpoints of a run stay."""
    options = run.config.checkpoint
    return RetentionPolicy(options.keep, options.keep_best, run.durations.keep_every)


def abstract_state(run: Run) -> TrainState:
    """Shapes and places of the state of a run, of which nothing is computed."""
    weights = split(run.model)[1]
    fresh = functools.partial(fresh_state, run.optimizer, run.averages)
    return abstract(jax.eval_shape(fresh, weights), run.mesh)


def make_card(
    class_names: Sequence[str] | None,
    config: ml_collections.ConfigDict,
    scores: dict[str, float] | None,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint says of its weights: their classes in order (None if nothing names them),
    configuration, scores, code version, and the data's fingerprint (None if they were not trained here)."""
    return {
        "class_names": None if class_names is None else list(class_names),
        "config": as_json(config),
        "metrics": scores,
        "version": structvit_jax.__version__,
        "data": fingerprint,
    }


def check_data(run: Run, card: dict[str, Any], path: epath.Path, is_complete: bool) -> None:
    """Compare the data of a run with those that its checkpoint was trained on.

    A run that is not complete may go on if half of a common sample is the same, as where files were repaired.

    Raises:
      UserError: a complete run of other data, or one of mostly other data.
    """
    if not card.get("data"):  # converted weights
        return
    changes = processes.broadcast_from_primary(lambda: run.data.changes_since(card["data"]))
    if not changes.described:
        return
    if is_complete or 2 * changes.alike < changes.sampled:
        kind = "the complete run of" if is_complete else "a run on"
        raise UserError(
            f"{path} is {kind} other data ({changes.described}); choose another --workdir for these, or"
            " evaluate the checkpoint on them with --mode=eval"
        )
    log(f"note: the data have changed ({changes.described})")


def adopt_classes(data: Any, card: dict[str, Any]) -> None:
    """Number the labels of the data as the model of a checkpoint does, by name.

    Raises:
      UserError: other classes, or a checkpoint that does not name its classes.
    """
    if card["class_names"] is None:
        raise UserError(
            "the checkpoint does not name its classes, so its outputs cannot be matched to the data's labels;"
            " name them with structvit convert CHECKPOINT DESTINATION --labels=FILE, one a line"
        )
    if data.adopt_classes(card["class_names"]):
        log("note: the data order their classes unlike the checkpoint; labels follow it by name")


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration in plain types."""
    return json.loads(config.to_json_best_effort())


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what changed between two configurations, a line each; how a machine runs them does not count."""
    return [
        f"{key} is now {short(after)}; the checkpoint was trained with {short(before)}"
        for key, (before, after) in changed_keys(old, new).items()
        if is_portable(key.removeprefix("config."))
    ]


def changed_keys(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "config"
) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ, as config.train.seed, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= changed_keys(before, after, f"{prefix}.{key}")
        elif before != after:
            found[f"{prefix}.{key}"] = before, after
    return found
