"""Every key of a configuration, once, with its meaning; files in `configs/` change values only."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import ml_collections
from ml_collections import config_dict

from structvit_jax.errors import UserError
from structvit_jax.models.variants import OVERRIDES, Variant


def default_config() -> ml_collections.ConfigDict:
    """The defaults, locked: a key that is not here is an error.

    Durations are "N steps", "N epochs" or "N examples"; fractions are allowed.
    """
    config = ml_collections.ConfigDict()
    config.init_from = ""  # a checkpoint directory of ours to take weights from; "" starts fresh

    config.model = model = ml_collections.ConfigDict()
    model.name = "structvit_tiny_4_1_video"  # see structvit_jax.list_models
    for key, kind in _override_types().items():  # None keeps the named model's own value
        model[key] = config_dict.placeholder(kind)

    config.data = data = ml_collections.ConfigDict()
    data.name = "moving_digits"  # see structvit_jax.data.SOURCES
    data.batch_size = 64  # examples per step, over all devices
    data.train_examples = 0  # for data made on the fly: how many examples an epoch has
    data.test_examples = 0  # the same for the test split
    data.mean = (0.5, 0.5, 0.5)  # subtracted from channels scaled to 0..1
    data.std = (0.5, 0.5, 0.5)  # then divided by

    config.train = train = ml_collections.ConfigDict()
    train.duration = "100 steps"
    train.seed = 0  # of weights, training data made on the fly, order, augmentation, stochastic depth
    train.label_smoothing = 0.0

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.lr = 1e-3  # peak learning rate of AdamW
    optimizer.warmup = "0 steps"  # linear, from warmup_lr
    optimizer.warmup_lr = 1e-6
    optimizer.end_lr = 1e-6  # of the cosine, where the step after the last would be
    optimizer.weight_decay = 0.05  # not on vectors (biases, norms, layer scales) and position tables
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.clip_norm = 0.0  # global gradient norm; 0 is off

    config.eval = ml_collections.ConfigDict()
    config.eval.every = ""  # evaluate at this interval; "" at the end only
    config.eval.batch_size = 256

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = "1 epochs"
    config.checkpoint.keep = 2  # how many of the latest stay

    config.mesh = ml_collections.ConfigDict()
    config.mesh.device = "auto"  # "auto" takes JAX's own choice, "cpu", "gpu" or "tpu" insist
    config.mesh.data = -1  # devices along the data axis; -1 takes all that fsdp leaves
    config.mesh.fsdp = 1  # devices over which parameters and optimizer state are split as well
    return config.lock()


def _override_types() -> dict[str, type]:
    kinds = {"str": str, "bool": bool, "int": int, "float": float, "float | None": float}
    kinds |= {"tuple[int, ...]": tuple, "int | tuple[int, ...]": object}
    return {
        field.name: kinds[str(field.type)] for field in dataclasses.fields(Variant) if field.name in OVERRIDES
    }


def model_arguments(config: ml_collections.ConfigDict) -> dict:
    """Name and overrides of the configured model, as arguments of `create_model`."""
    return {key: value for key, value in config.model.items() if value is not None}


class Durations(NamedTuple):
    """The configured durations in steps; 0 is never."""

    total: int
    warmup: int
    eval_every: int
    save_every: int


def durations(config: ml_collections.ConfigDict, train_examples: int) -> Durations:
    """All durations of a configuration, for a training set of so many examples.

    Raises:
      UserError: one that cannot be read, a run of no steps, or a warm-up longer than the run.
    """

    def steps(key):
        section, name = key.split(".")
        return steps_in(config[section][name], f"config.{key}", config.data.batch_size, train_examples)

    keys = ("train.duration", "optimizer.warmup", "eval.every", "checkpoint.every")
    result = Durations(*map(steps, keys))
    if result.total < 1:
        raise UserError(f"config.train.duration is {config.train.duration!r}; a run needs a step at least")
    if result.warmup > result.total:
        raise UserError(
            f"config.optimizer.warmup is {result.warmup} steps, longer than the run of {result.total};"
            " shorten it with --config.optimizer.warmup='N steps'"
        )
    return result


def steps_in(duration: str, key: str, batch_size: int, train_examples: int) -> int:
    """Steps in "N steps", "N epochs" or "N examples", rounded, at least one if N is not zero; "" is 0."""
    if not duration:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(steps?|epochs?|examples?)\s*", duration)
    if not match:
        raise UserError(f"{key} is {duration!r}; write 'N steps', 'N epochs' or 'N examples'")
    number, unit = float(match[1]), match[2].rstrip("s")
    per_unit = {"step": 1.0, "epoch": train_examples / batch_size, "example": 1 / batch_size}[unit]
    return max(round(number * per_unit), 1 if number else 0)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, in one line, for the first value outside its range."""

    def require(key, condition, needs):
        value = config
        for part in key.split("."):
            value = value[part]
        if not condition(value):
            raise UserError(f"config.{key} is {value!r}; it needs {needs}")

    for key in ("data.batch_size", "eval.batch_size", "checkpoint.keep", "mesh.fsdp"):
        require(key, lambda n: n >= 1, "to be at least 1")
    for key in ("optimizer.lr", "optimizer.eps"):
        require(key, lambda x: 0 < x < math.inf, "to be positive and finite")
    for key in ("optimizer.weight_decay", "optimizer.clip_norm", "optimizer.warmup_lr", "optimizer.end_lr"):
        require(key, lambda x: 0 <= x < math.inf, "to be finite and not negative")
    for key in ("optimizer.b1", "optimizer.b2", "train.label_smoothing"):
        require(key, lambda x: 0 <= x < 1, "to lie from 0 to below 1")
    require("train.seed", lambda n: 0 <= n < 2**31, "to lie from 0 to below 2**31")
    require("mesh.data", lambda n: n == -1 or n >= 1, "to be -1 or at least 1")
    require("mesh.device", lambda d: d in ("auto", "cpu", "gpu", "tpu"), "to be auto, cpu, gpu or tpu")
    for key, least in (("data.mean", -math.inf), ("data.std", 0.0)):
        require(
            key,
            lambda xs, least=least: (
                len(xs) == 3 and all(isinstance(x, (int, float)) and least < x < math.inf for x in xs)
            ),
            "three finite numbers, one per channel" + (", positive" if least == 0 else ""),
        )
