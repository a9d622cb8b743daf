"""What the train step is compiled from: a model, its optimizer, their mesh, and the shape of a batch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from structvit_jax.config import durations, model_arguments
from structvit_jax.data.types import Arrays, Dataset
from structvit_jax.models import Network, create_model
from structvit_jax.models.weights import Weights, split
from structvit_jax.ops.kernels import native
from structvit_jax.runtime.devices import describe_devices
from structvit_jax.runtime.mesh import abstract, check_batch, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.training import optim
from structvit_jax.training.step import TrainState, fresh_state, init_state, normalize
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model with the optimizer that trains it."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: Network  # with fresh weights
    schedule: optax.Schedule  # learning rate by step
    optimizer: optim.Optimizer
    row: Arrays  # shapes and dtypes of one row of a training batch

    @classmethod
    def create(cls, config: ml_collections.ConfigDict, data: Dataset, mesh: Mesh | None = None) -> Learner:
        """Build all parts and check that they fit together, before anything is compiled or written.

        Args:
          config: see `structvit_jax.config`.
          data: determines the input shape, the classes and the length of an epoch.
          mesh: of devices of another machine, to compile for them; by default of all devices of this run.

        Raises:
          UserError: the model does not take inputs of this shape, or a batch is not divisible by the devices.
        """
        if mesh is None:
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
            check_batch(mesh, "eval.batch_size", config.eval.batch_size)
            log(f"devices: {describe_devices()}; mesh {dict(mesh.shape)}")
            if jax.default_backend() == "cpu" and not native.available():
                log("note: no C++ compiler found (c++, or the one that CXX names); operations run slower")
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
        schedule = optim.learning_rate(config.optimizer, durations(config, data.rows_per_epoch))
        return cls(config, mesh, model, schedule, optimizer, data.arrays)

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.config.optimizer.ema > 0

    def init_state(self, weights: Weights) -> TrainState:
        """Return the state before the first step, placed on the mesh."""
        return init_state(weights, self.optimizer, self.mesh, averaged=self.averages)

    def abstract_state(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state; nothing is computed."""
        fresh = functools.partial(fresh_state, self.optimizer, self.averages)
        return abstract(jax.eval_shape(fresh, split(self.model)[1]), self.mesh)


def _check_token_labels(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if token labelling is configured in part."""
    for key in ("data.label_maps", "augment.mix_token"):
        section, name = key.split(".")
        if config[section][name] and not config.model.token_labels:
            raise UserError(f"config.{key} is for token labelling; set --config.model.token_labels as well")
    if config.data.label_maps and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            "config.data.label_maps: mixup and cutmix do not mix maps; set --config.augment.mixup=0"
            " --config.augment.cutmix=0, and --config.augment.mix_token=1 in their place"
        )


def check_train_batch(learner: Learner) -> None:
    """Check that the training batch can be divided, and warn about steps on single examples.

    BatchNorm over one example subtracts from its features the very mean that the head would read.

    Raises:
      UserError: the batch is not divisible by the devices and the accumulation steps.
    """
    config = learner.config
    rows, parts = config.data.batch_size, config.train.grad_accum_steps
    check_batch(learner.mesh, "data.batch_size", rows, parts)
    if learner.model.variant.network == "uniformer" and rows == parts:
        log(
            "warning: each training step normalises a single example (config.data.batch_size /"
            " config.train.grad_accum_steps is 1), so in training mode this model's logits are the same for"
            " every input. Use at least two examples"
        )
