"""Implement `structvit convert`: convert weights between PyTorch files, checkpoints and models.

This module imports the training code, so `structvit_jax.convert` does not import it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

import structvit_jax
from structvit_jax.config import recipes
from structvit_jax.convert import weight_files
from structvit_jax.convert.adapt import NOISE, Rules, adapt
from structvit_jax.convert.array_names import to_torch
from structvit_jax.convert.description import Description, check_class_names
from structvit_jax.convert.source import Source, read_released
from structvit_jax.convert.weight_files import is_weights_file
from structvit_jax.models import create_model
from structvit_jax.models.weights import Weights, cast_like, split
from structvit_jax.runtime.mesh import make_mesh
from structvit_jax.runtime.storage import CONFIG, io_errors_as_user_error, write_json
from structvit_jax.training import start
from structvit_jax.training.card import as_json, make_card
from structvit_jax.training.checkpoint import FOLDER, Checkpoints, RetentionPolicy
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import check_local


def convert(
    source: str,
    destination: str,
    *,
    model: str | None = None,
    data: str | None = None,
    head_width: int | None = None,
    weights: str | None = None,
    labels: str | None = None,
    inflate: str = "average",
    noise: float = NOISE,
) -> None:
    """Convert weights and print a summary.

    Args:
      source: a file of PyTorch weights, a run or a checkpoint.
      destination: a new folder for a checkpoint, or a new file of PyTorch weights, on a local disk.
      model: name of the model to which the weights are fitted; None keeps the model of the weights.
      data: the data set of released weights, a name in `structvit_jax.convert.RELEASED`.
      head_width: 32 or 64, if models of this size were released with both.
      weights: "raw" or "ema", for files that hold both.
      labels: a file with the class names, one per line, in the order of the head.
      inflate: how image weights are spread over time, see `structvit_jax.convert.adapt.inflate`.
      noise: standard deviation of the noise that is added to equal value kernels.

    Raises:
      UserError: the source cannot be read or fitted, or the destination cannot be written.
    """
    if not 0 <= noise < math.inf:
        raise UserError(f"--noise is {noise:g}; it must be finite and not negative")
    check_local(destination)
    with weight_files.create(destination) as path:
        if is_weights_file(source):
            given = read_released(source, model=model, data=data, head_width=head_width, which=weights)
        elif data or head_width or weights:
            raise UserError(
                f"{source} is not a file of PyTorch weights (.pth, .safetensors); omit --data, --head_width"
                " and --weights, which apply to such files only"
            )
        else:
            given = start.find_weights(source, make_mesh(-1, 1))
        if labels:
            given = _with_labels(given, labels)
        print(f"{given.where}: {given.model['name']}, {given.num_classes} classes")
        if given.inputs:
            print(f"  expects mean {given.inputs.mean}, std {given.inputs.std}, {given.inputs.channels}")
        for note in given.notes:
            print(f"  {note}")
        if given.class_names is None:
            print("  note: its classes have no names, so training will not keep its head; give --labels=FILE")
        arguments, fitted = _fit(given, model, Rules(inflate=inflate, noise=noise))
        write = _write_torch if is_weights_file(destination) else _write_checkpoint
        write(path, given, arguments, fitted)
    print(f"written: {destination}")


def _with_labels(source: Source, path: str) -> Source:
    """Return the weights with the class names that a file lists, one per line."""
    try:
        text = epath.Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--labels={path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read --labels={path}: {error.strerror or error}") from error
    lines = text.replace("\r", "\n").split("\n")
    names = tuple(line.strip() for line in lines if line.strip())
    try:
        check_class_names(names, source.num_classes)
    except UserError as error:
        raise UserError(f"{path} does not fit {source.where}: {error}") from error
    return dataclasses.replace(source, class_names=names, notes=(*source.notes, f"class names: {path}"))


def _fit(source: Source, name: str | None, rules: Rules) -> tuple[dict[str, Any], Weights]:
    """Fit weights to the model `name`, or to their own model; print a summary.

    Return the arguments of the model, and its weights.
    """
    arguments = source.model
    if name:
        kept = {key: value for key, value in arguments.items() if key in ("head_width", "token_labels")}
        arguments = {**kept, "name": name}
    model = create_model(**arguments, num_classes=source.num_classes)
    fresh = split(model)[1]
    adapted = adapt(source, fresh.params | fresh.batch_stats, model.variant, None, rules)
    for line in adapted.lines():
        print(f"  {line}")
    return arguments, cast_like(fresh, adapted.arrays)


def _write_torch(path: str, source: Source, model: dict[str, Any], weights: Weights) -> None:
    arrays = {name: np.asarray(array) for name, array in (weights.params | weights.batch_stats).items()}
    description = Description(model, source.class_names, source.inputs)
    weight_files.write(path, to_torch(arrays), description.as_plain(structvit_jax.__version__))


def _write_checkpoint(path: str, source: Source, model: dict[str, Any], weights: Weights) -> None:
    config = _recipe(source, model)
    folder = epath.Path(path)
    with io_errors_as_user_error(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, as_json(config))
        card = make_card(source.class_names, config, None) | {"from": source.where}
        with Checkpoints(folder, RetentionPolicy(1)) as checkpoints:
            checkpoints.save(TrainState(jnp.int32(0), weights, None), card)


def _recipe(source: Source, model: dict[str, Any]) -> ml_collections.ConfigDict:
    """Return a configuration with which the weights can be evaluated."""
    name = model["name"]
    if not name.endswith("_video"):
        config = recipes.images(name)
    elif source.inputs and source.inputs.channels == "bgr":  # Something-Something
        config = recipes.segment_video(name)
    else:
        config = recipes.dense_video(name)
    config.model.update(model)
    config.init_from = ""
    if source.inputs:
        config.data.update(source.inputs._asdict())
    return config
