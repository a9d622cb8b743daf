"""The body of `structvit convert`: PyTorch weights to a checkpoint, one model's to another's, and back.

It builds on checkpoints and recipes, so `structvit_jax.convert` does not import it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

import structvit_jax
from structvit_jax.config import INPUTS, recipes
from structvit_jax.convert import weight_files
from structvit_jax.convert.adapt import Rules, adapt
from structvit_jax.convert.array_names import to_torch
from structvit_jax.convert.description import Description
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
from structvit_jax.utils.paths import is_bucket, parse_path


class Request(NamedTuple):
    """The arguments of `structvit convert`."""

    source: str
    destination: str
    model: str | None = None  # to fit the weights to; None keeps their own
    data: str | None = None  # that released weights were trained on, see `structvit_jax.convert.RELEASED`
    head_width: int | None = None  # 32 or 64, if both were released
    weights: str | None = None  # "raw" or "ema", for files that hold both
    labels: str | None = None  # a file with the class names
    inflate: str = "average"  # image weights over time: "average" or "centre"
    noise: float = Rules.noise  # deviation that sets equal structure kernels apart


def convert(request: Request) -> None:
    """Convert weights and print a summary.

    Raises:
      UserError: a source that cannot be read or fitted, or a destination that cannot be written.
    """
    if not 0 <= request.noise < math.inf:
        raise UserError(f"--noise is {request.noise:g}; it needs to be finite and not negative")
    with _create(request.destination) as path:
        source = _read(request)
        print(f"{source.where}: {source.model['name']}, {source.num_classes} classes")
        if source.inputs:
            print(f"  expects mean {source.inputs.mean}, std {source.inputs.std}, {source.inputs.channels}")
        for note in source.notes:
            print(f"  {note}")
        if source.class_names is None:
            print("  note: its classes have no names, so training will not keep its head; give --labels=FILE")
        model, weights = _fit(source, request)
        write = _write_torch if is_weights_file(request.destination) else _write_checkpoint
        write(path, source, model, weights)
    print(f"written: {request.destination}")


@contextlib.contextmanager
def _create(destination: str) -> Iterator[str]:
    """Yield the path to write to, after checking that it can be written; see `weight_files.create`.

    A bucket cannot rename: there, a conversion is complete when its checkpoint is.
    """
    folder = parse_path(destination)
    if not is_bucket(folder):
        with weight_files.create(destination) as path:
            yield path
        return
    if is_weights_file(destination):
        raise UserError(f"{destination}: files of PyTorch weights are written to a disk; choose a local path")
    with io_errors_as_user_error(folder):
        if (folder / FOLDER).exists():
            with Checkpoints(folder) as checkpoints:
                if checkpoints.steps():
                    raise UserError(f"{destination} already exists; choose another name")
    yield destination


def _read(request: Request) -> Source:
    if is_weights_file(request.source):
        source = read_released(
            request.source,
            model=request.model,
            data=request.data,
            head_width=request.head_width,
            which=request.weights,
        )
    elif request.data or request.head_width or request.weights:
        raise UserError(
            f"{request.source} is not a file of PyTorch weights (.pth, .safetensors); omit --data,"
            " --head_width and --weights, which are for those"
        )
    else:
        source = start.find_weights(request.source, make_mesh(-1, 1))
    if request.labels:
        return source.with_class_names(_read_labels(request.labels), request.labels)
    return source


def _read_labels(path: str) -> list[str]:
    try:
        text = epath.Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--labels={path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read --labels={path}: {error.strerror or error}") from error
    return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


def _fit(source: Source, request: Request) -> tuple[dict[str, Any], Weights]:
    """Return the arguments of the model to write, and its weights."""
    arguments = source.model
    if request.model:
        kept = {key: value for key, value in arguments.items() if key in ("head_width", "token_labels")}
        arguments = kept | {"name": request.model}
    model = create_model(**arguments, num_classes=source.num_classes)
    fresh = split(model)[1]
    rules = Rules(inflate=request.inflate, noise=request.noise)
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
    """Return the configuration to evaluate the weights with."""
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
        config.data.update({key: getattr(source.inputs, key) for key in INPUTS})
    return config
