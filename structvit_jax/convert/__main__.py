"""Turns released PyTorch weights into a checkpoint of ours, another model's into a StructViT's, and back.

    python -m structvit_jax.convert SOURCE DESTINATION [--model=NAME] [--data=NAME] [--head_width=32]

SOURCE is a .pth (the extra torch) or .safetensors file of a UniFormer, or a run or checkpoint of ours.
DESTINATION is a new folder, which config.init_from and structvit_jax.evaluate take, or a .pth or .safetensors
file, which gets PyTorch's keys. --model=structvit_s_4_1 makes a StructViT that computes what the UniFormer
does; --model=uniformer_s_video inflates it. What the weights' shapes cannot tell is asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from structvit_jax import recipes
from structvit_jax.convert import (
    RELEASED,
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
from structvit_jax.training import start
from structvit_jax.training.checkpoint import FOLDER, Checkpoints, Keep
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
    parser.add_argument("--model", default="", help="of ours, to fit the weights to; without it, their own")
    parser.add_argument("--data", default="", help=f"what they were trained on: {', '.join(RELEASED)}")
    parser.add_argument(
        "--head_width", type=int, default=0, choices=(32, 64), help="32 or 64, where the release has both"
    )
    parser.add_argument("--labels", default="", help="a file with the names of their classes, one a line")
    parser.add_argument("--inflate", default="average", choices=("average", "centre"), help="over time")
    parser.add_argument("--noise", type=float, default=Rules.noise, help="that sets equal patterns apart")
    chosen = parser.parse_args(arguments)
    if not is_weights_file(chosen.destination) and os.path.exists(chosen.destination):
        raise UserError(f"{chosen.destination} is there already; choose another name")
    source = _read(chosen)
    print(f"{source.where}: {source.model['name']}, {source.num_classes} classes")
    if source.inputs:
        print(f"  expects mean {source.inputs.mean}, std {source.inputs.std}, {source.inputs.channels}")
    model, weights = _fit(source, chosen)
    if is_weights_file(chosen.destination):
        _write_torch(chosen.destination, weights)
    else:
        _write_checkpoint(chosen.destination, source, model, weights)
    print(f"written: {chosen.destination}")


def _read(chosen: argparse.Namespace) -> Source:
    if not is_weights_file(chosen.source):
        if chosen.data or chosen.head_width or chosen.labels:
            raise UserError(f"{chosen.source} is a checkpoint of ours: --model alone has a meaning for it")
        return start.find_weights(chosen.source, make_mesh(-1, 1))
    labels = _read_labels(chosen.labels) if chosen.labels else None
    return read_released(
        chosen.source, model=chosen.model, data=chosen.data, head_width=chosen.head_width, labels=labels
    )


def _read_labels(path: str) -> list[str]:
    try:
        return epath.Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --labels={path}: {error}") from error


def _fit(source: Source, chosen: argparse.Namespace) -> tuple[dict[str, Any], Weights]:
    """The arguments of the model to write, and its weights."""
    arguments = source.model
    if chosen.model:
        kept = {key: value for key, value in arguments.items() if key in ("head_width", "token_labels")}
        arguments = kept | {"name": chosen.model}
    model = create_model(**arguments, num_classes=source.num_classes)
    fresh = split(model)[1]
    rules = Rules(inflate=chosen.inflate, noise=chosen.noise)
    adapted = adapt(source, fresh.params | fresh.batch_stats, model.variant, source.class_names, rules)
    print(*(f"  {line}" for line in adapted.lines()), sep="\n")
    return arguments, like(fresh, adapted.arrays)


def _write_torch(path: str, weights: Weights) -> None:
    arrays = {name: np.asarray(array) for name, array in (weights.params | weights.batch_stats).items()}
    files.write(path, to_torch(arrays))


def _write_checkpoint(path: str, source: Source, model: dict[str, Any], weights: Weights) -> None:
    config = _config(source, model)
    folder = epath.Path(path)
    with naming_failures(folder):
        (folder / FOLDER).mkdir(parents=True)
        write_json(folder / CONFIG, as_json(config))
        card = make_card(source.class_names, config, None) | {"from": source.where}
        with Checkpoints(folder, Keep(1)) as checkpoints:
            checkpoints.save(TrainState(jnp.int32(0), weights, None), card)


def _config(source: Source, model: dict[str, Any]) -> ml_collections.ConfigDict:
    """The recipe that the weights are evaluated by."""
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
