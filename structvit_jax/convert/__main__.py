"""Convert PyTorch weights to a checkpoint, one model's weights to another's, and back to PyTorch's keys.

    python -m structvit_jax.convert SOURCE DESTINATION [--model=NAME] [--data=NAME] [--labels=FILE]

SOURCE is a .pth (the extra torch) or .safetensors file of a UniFormer or StructViT, or a run or checkpoint.
DESTINATION is a new folder, which config.init_from and structvit_jax.evaluate take, or a .pth or .safetensors
file, which gets PyTorch's keys, with model, class names and normalisation beside them.
--model=structvit_s_4_1 makes a StructViT that computes what the UniFormer does; --model=uniformer_s_video
inflates it. What neither the file nor the shapes of its weights determine has to be given.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

import structvit_jax
from structvit_jax import recipes
from structvit_jax.convert import (
    RELEASED,
    Description,
    Rules,
    Source,
    adapt,
    files,
    is_weights_file,
    read_released,
    to_torch,
)
from structvit_jax.errors import UserError, exit_in_one_line
from structvit_jax.models import create_model
from structvit_jax.models.weights import Weights, like, split
from structvit_jax.paths import is_bucket, parse_path
from structvit_jax.training import start
from structvit_jax.training.checkpoint import Checkpoints, Keep
from structvit_jax.training.commit import FOLDER
from structvit_jax.training.mesh import make_mesh
from structvit_jax.training.run import as_json, make_card
from structvit_jax.training.step import TrainState
from structvit_jax.training.storage import CONFIG, naming_failures, write_json


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m structvit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--model", default="", help="to fit the weights to; without it, their own")
    parser.add_argument("--data", default="", help=f"what they were trained on: {', '.join(RELEASED)}")
    parser.add_argument(
        "--head_width", type=int, default=0, choices=(32, 64), help="32 or 64, where the release has both"
    )
    parser.add_argument(
        "--weights", default="", choices=(files.RAW, files.AVERAGED), help="of files that hold both"
    )
    parser.add_argument("--labels", default="", help="a file with the class names, one a line, as numbered")
    parser.add_argument("--inflate", default="average", choices=("average", "centre"), help="over time")
    parser.add_argument("--noise", type=float, default=Rules.noise, help="that sets equal patterns apart")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.noise < math.inf:
        raise UserError(f"--noise is {chosen.noise:g}; it needs to be finite and not negative")
    with _create(chosen.destination) as place:
        source = _read(chosen)
        print(f"{source.where}: {source.model['name']}, {source.num_classes} classes")
        if source.inputs:
            print(f"  expects mean {source.inputs.mean}, std {source.inputs.std}, {source.inputs.channels}")
        print(*(f"  {note}" for note in source.notes), sep="\n", end="\n" * bool(source.notes))
        if source.class_names is None:
            print("  note: its classes have no names, so training will not keep its head; give --labels=FILE")
        model, weights = _fit(source, chosen)
        if is_weights_file(chosen.destination):
            _write_torch(place, source, model, weights)
        else:
            _write_checkpoint(place, source, model, weights)
    print(f"written: {chosen.destination}")


@contextlib.contextmanager
def _create(destination: str) -> Iterator[str]:
    """Yield where to write, after checking that it can be written; see `files.create`.

    A bucket cannot rename: there a conversion is complete when its checkpoint is.
    """
    folder = parse_path(destination)
    if not is_bucket(folder):
        with files.create(destination) as place:
            yield place
        return
    if is_weights_file(destination):
        raise UserError(f"{destination}: files of PyTorch weights are written to a disk; choose a local path")
    with naming_failures(folder):
        if (folder / FOLDER).exists():
            with Checkpoints(folder) as checkpoints:
                if checkpoints.steps():
                    raise UserError(f"{destination} already exists; choose another name")
    yield destination


def _read(chosen: argparse.Namespace) -> Source:
    if is_weights_file(chosen.source):
        source = read_released(
            chosen.source,
            model=chosen.model,
            data=chosen.data,
            head_width=chosen.head_width,
            which=chosen.weights,
        )
    elif chosen.data or chosen.head_width or chosen.weights:
        raise UserError(
            f"{chosen.source} is no file of PyTorch weights (.pth, .safetensors), which --data, --head_width"
            " and --weights are for"
        )
    else:
        source = start.find_weights(chosen.source, make_mesh(-1, 1))
    if chosen.labels:
        return source.with_class_names(_read_labels(chosen.labels), chosen.labels)
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


def _fit(source: Source, chosen: argparse.Namespace) -> tuple[dict[str, Any], Weights]:
    """Return the arguments of the model to write, and its weights."""
    arguments = source.model
    if chosen.model:
        kept = {key: value for key, value in arguments.items() if key in ("head_width", "token_labels")}
        arguments = kept | {"name": chosen.model}
    model = create_model(**arguments, num_classes=source.num_classes)
    fresh = split(model)[1]
    rules = Rules(inflate=chosen.inflate, noise=chosen.noise)
    adapted = adapt(source, fresh.params | fresh.batch_stats, model.variant, None, rules)
    print(*(f"  {line}" for line in adapted.lines()), sep="\n")
    return arguments, like(fresh, adapted.arrays)


def _write_torch(path: str, source: Source, model: dict[str, Any], weights: Weights) -> None:
    arrays = {name: np.asarray(array) for name, array in (weights.params | weights.batch_stats).items()}
    description = Description(model, source.class_names, source.inputs)
    files.write(path, to_torch(arrays), description.as_plain(structvit_jax.__version__))


def _write_checkpoint(path: str, source: Source, model: dict[str, Any], weights: Weights) -> None:
    config = _config(source, model)
    folder = epath.Path(path)
    with naming_failures(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, as_json(config))
        card = make_card(source.class_names, config, None) | {"from": source.where}
        with Checkpoints(folder, Keep(1)) as checkpoints:
            checkpoints.save(TrainState(jnp.int32(0), weights, None), card)


def _config(source: Source, model: dict[str, Any]) -> ml_collections.ConfigDict:
    """Return the recipe that the weights are evaluated by."""
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
        for key in ("mean", "std", "channels"):
            config.data[key] = getattr(source.inputs, key)
    return config


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)  # Orbax logs its whole life; what matters it raises
    with exit_in_one_line():
        main(sys.argv[1:])
