"""A model with its optimizer, mesh and batch shape, and the train step that is compiled for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Iterator

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
from structvit_jax.runtime import processes
from structvit_jax.runtime.devices import describe_devices
from structvit_jax.runtime.mesh import abstract, batch_sharding, check_batch, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.training import optim
from structvit_jax.training.step import TrainState, fresh_state, init_state, make_train_step, normalize
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
        """Build all parts and check that they fit together, without compiling or writing anything.

        Args:
          config: see `structvit_jax.config`.
          data: sets the input shape, the classes and the length of an epoch.
          mesh: devices of another machine, to compile for that machine. By default, the devices of this run.

        Raises:
          UserError: the model does not take inputs of this shape, a batch is not divisible by the devices, or
            options of token labelling do not fit together.
        """
        if mesh is None:
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
            check_batch(mesh, "eval.batch_size", config.eval.batch_size)
            log(f"devices: {describe_devices()}; mesh {dict(mesh.shape)}")
            if jax.default_backend() == "cpu" and not native.available():
                log("note: no C++ compiler found (c++, or the one that CXX names); operations run slower")
        _check_token_labels(config)
        classes = len(data.class_names)
        model = create_model(**model_arguments(config), num_classes=classes, seed=config.train.seed)
        example = jax.ShapeDtypeStruct((1, *data.shape), jnp.uint8)
        jax.eval_shape(lambda x: model(normalize(x, config)), example)  # checks the input shape
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
        """Return the shapes, dtypes and shardings of the state, without computing it."""
        fresh = functools.partial(fresh_state, self.optimizer, self.averages)
        return abstract(jax.eval_shape(fresh, split(self.model)[1]), self.mesh)


def _check_token_labels(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if the options of token labelling do not fit together."""
    for key in ("data.label_maps", "augment.mix_token"):
        section, name = key.split(".")
        if config[section][name] and not config.model.token_labels:
            raise UserError(
                f"config.{key} is for token labelling; set --config.model.token_labels=true as well"
            )
    if config.data.label_maps and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            "config.data.label_maps: mixup and cutmix do not mix maps; set --config.augment.mixup=0"
            " --config.augment.cutmix=0, and --config.augment.mix_token=1 in their place"
        )


def check_train_batch(learner: Learner) -> None:
    """Check that the training batch can be divided, and warn if BatchNorm sees single examples.

    With a single example, BatchNorm subtracts its mean over positions. The head reads only the mean over
    positions of the result, so the logits do not depend on the input.

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


def compile_train_step(learner: Learner, state: TrainState) -> jax.stages.Compiled:
    """Compile the train step before its first call, and log how long this takes."""
    log("compiling the train step ...")
    started = time.monotonic()
    compiled = trace_train_step(learner, state).lower().compile()
    log(f"compiled in {time.monotonic() - started:.1f} s")
    processes.barrier()  # some load it from the compilation cache, and others compile for minutes
    return compiled


def trace_train_step(learner: Learner, state: TrainState) -> jax.stages.Traced:
    """Trace the train step. The result has its jaxpr, and can be lowered and compiled.

    Args:
      learner: the model, its optimizer and their configuration.
      state: a state, or its shapes, as returned by `Learner.abstract_state`.
    """
    config, mesh = learner.config, learner.mesh
    train_step = make_train_step(learner.model, learner.optimizer, learner.schedule, config, mesh, state)
    row = learner.row | {"mask": ((), jnp.bool_), "index": ((), jnp.int32)}
    batch = {
        key: jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for key, (shape, dtype) in row.items()
    }
    return train_step.trace(abstract(state, mesh), batch)


def memory_of(compiled: jax.stages.Compiled) -> float:
    """Return the bytes that a program needs on one device: arguments, results, temporaries and code."""
    sizes = compiled.memory_analysis()
    assert sizes is not None
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )


@contextlib.contextmanager
def oom_as_user_error(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Turn out-of-memory errors into a UserError.

    Raises:
      UserError: one line with the requested memory, the available memory and the keys to change.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if not (isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", text)):
            raise
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        available = f"{limit / 2**30:.1f} GiB available" if limit else "less available"
        parts, remat = config.train.grad_accum_steps, config.model.remat or "none"
        raise UserError(
            f"out of memory: {_requested_memory(text)}; a {device.device_kind} has {available}. Lower"
            f" config.data.batch_size (now {config.data.batch_size}), raise config.train.grad_accum_steps"
            f" (now {parts}) or set config.model.remat (now {remat}) to 'dots' or 'full'; in evaluation lower"
            f" config.eval.batch_size (now {config.eval.batch_size}); `structvit plan --device_memory=SIZE`"
            " finds the largest batch"
        ) from error


def _requested_memory(text: str) -> str:
    """Return the requested memory that a message of XLA states, or else the beginning of the message."""
    amount = r"([\d.]+) ?([KMGT]i?B?|bytes)\b"
    verb = r"(?:allocat\w+|requires?|[Uu]sed|needs?) (?:a buffer of )?"
    match = re.search(verb + amount, text) or re.search(amount, text)
    if not match:
        return text[:200]
    number, unit = match.groups()
    if unit == "bytes":
        number, unit = f"{float(number) / 2**30:.1f}", " GiB"
    return f"the program asked for {number}{unit}"
