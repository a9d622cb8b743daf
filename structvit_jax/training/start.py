"""The state from which a run starts: its latest checkpoint, weights from elsewhere, or fresh weights.

Trained weights expect inputs that are normalised as in their training. If a configuration leaves the
normalisation open, it is taken from the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_collections
from etils import epath
from jax.sharding import Mesh

from structvit_jax import convert
from structvit_jax.config import INPUTS, automatic, keys_of, model_arguments, set_value
from structvit_jax.data.types import Dataset
from structvit_jax.models.variants import get_variant
from structvit_jax.models.weights import Weights, cast_like, split
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import io_errors_as_user_error
from structvit_jax.training.card import as_json, differences, from_card, is_portable
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.learner import Learner
from structvit_jax.training.restore import (
    adopt_classes,
    check_data,
    newest_card,
    open_card,
    open_checkpoint,
    rereading,
)
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import UserError


def resolve_open_keys(config: ml_collections.ConfigDict, workdir: epath.Path) -> ml_collections.ConfigDict:
    """Return the configuration with its open keys (None) filled in from the weights that the run starts with.

    Open keys are those of INPUTS and of `structvit_jax.config.automatic`. The newest checkpoint in the
    workdir sets all of them. Without a checkpoint, the weights of config.init_from or the defaults set those
    of INPUTS, and the others stay open until the data are known. This function opens no device and waits for
    no other process.

    Raises:
      UserError: config.init_from names no weights, or weights that cannot be identified.
    """
    inputs = [f"data.{key}" for key in INPUTS if config.data[key] is None]
    open_keys = inputs + automatic.missing(config)
    if not open_keys:
        return config
    with io_errors_as_user_error(workdir):
        card = newest_card(workdir)
    found: dict[str, Any] = {}
    if card:
        found = {key: v for key, v in keys_of(from_card(card["config"], workdir)) if is_portable(key)}
    elif inputs and config.init_from:
        found = {f"data.{key}": value for key, value in _read_inputs(config.init_from).items()}
    values = {f"data.{key}": value for key, value in INPUTS.items()}
    values |= {key: value for key, value in found.items() if value is not None}
    config = config.copy_and_resolve_references()
    for key in open_keys:
        if key in values:
            set_value(config, key, values[key])
    return config


def _read_inputs(path: str) -> dict[str, Any]:
    """Return the normalisation that the weights at a path expect, by the keys of INPUTS; None if unknown."""
    if convert.is_weights_file(path):
        return _inputs_of(_read_released(path))
    config = from_card(open_card(path)["config"], path)
    return {key: config.data[key] for key in INPUTS}


def _inputs_of(source: convert.Source) -> dict[str, Any]:
    return {key: getattr(source.inputs, key, None) for key in INPUTS}


def starting_state(learner: Learner, data: Dataset, checkpoints: Checkpoints, total_steps: int) -> TrainState:
    """Return the state of the latest checkpoint.

    Without a checkpoint, return the state before the first step, with the weights of config.init_from or, if
    that is "", with fresh weights.

    Raises:
      UserError: the checkpoint or the weights do not fit the model or the data, or config.init_from is None.
    """
    if (latest := checkpoints.latest()) is not None:
        return _resume(learner, data, checkpoints, latest, total_steps)
    weights, init_from = split(learner.model)[1], learner.config.init_from
    if init_from is None:
        raise UserError(
            "config.init_from is not set, and this recipe starts from trained weights: name a run, a"
            " checkpoint or a released file, or start from scratch with --config.init_from="
        )
    if init_from:
        weights = _fine_tune(learner, weights, tuple(data.class_names))
    else:
        log("starting from scratch")
    return learner.init_state(weights)


def _resume(
    learner: Learner, data: Dataset, checkpoints: Checkpoints, step: int, total_steps: int
) -> TrainState:
    path, config = checkpoints.path(step), learner.config
    where = f"{path}, step {step} of {total_steps}"
    if step > total_steps:
        log(f"{where}: the checkpoint is already past the last step")
    else:
        log(f"resuming from {where}")
    if not checkpoints.has(step, "optimizer"):  # a converted checkpoint
        raise UserError(
            f"{path} holds weights only, without the optimizer state that resuming needs; start from them"
            f" with --config.init_from={path} and another --workdir"
        )
    card = checkpoints.card(step)
    adopt_classes(data, card)
    check_data(data, card, path, is_complete=step >= total_steps)
    before = from_card(card["config"], path).optimizer
    for key in ("name", "freeze"):
        if before[key] != (now := config.optimizer[key]):
            raise UserError(
                f"config.optimizer.{key} is {now!r}, and {path} was trained with {before[key]!r}: the state"
                f" of its optimizer does not fit. Start another run from it: --config.init_from={path}"
                " --workdir=..."
            )
    advice = "choose another --workdir, or the model that was saved"
    state = checkpoints.state(step, learner.abstract_state(), learner.mesh, advice)
    for difference in differences(card["config"], as_json(config)):
        log(f"note: {difference.describe()}")
    return state


def _fine_tune(learner: Learner, fresh: Weights, class_names: tuple[str, ...]) -> Weights:
    """Return the weights of config.init_from adapted to the model, and log a summary."""
    config = learner.config
    source = find_weights(config.init_from, learner.mesh)
    rules = convert.Rules(**config.init, seed=config.train.seed)
    arrays, variant = fresh.params | fresh.batch_stats, learner.model.variant
    adapted = convert.adapt(source, arrays, variant, class_names, rules)
    log(f"fine-tuning: starting at step 0 from the {source.model['name']} in {source.where}")
    for line in (*source.notes, *adapted.lines()):
        log(f"  {line}")
    for key, trained_with in _inputs_of(source).items():
        if trained_with is not None and config.data[key] != trained_with:
            log(
                f"  note: config.data.{key} is {config.data[key]!r}; the weights were trained with"
                f" {trained_with!r}"
            )
    return cast_like(fresh, adapted.arrays)


@rereading
def find_weights(path: str, mesh: Mesh) -> convert.Source:
    """Load the weights of a released file or a checkpoint.

    Raises:
      UserError: there are no weights at the path, or they cannot be used.
    """
    if convert.is_weights_file(path):
        return _read_released(path)
    with open_checkpoint(path) as (checkpoints, step):
        card = checkpoints.card(step)
        config = from_card(card["config"], checkpoints.path(step))
        arrays, averaged = checkpoints.whole(step, mesh)
    model, names = model_arguments(config), card["class_names"]
    return convert.Source(
        arrays,
        get_variant(**model),
        model,
        arrays["head.bias"].size,
        None if names is None else tuple(names),
        convert.Inputs(**{key: config.data[key] for key in INPUTS}),
        f"{checkpoints.path(step)}{' (averaged weights)' * averaged}",
    )


@functools.lru_cache(maxsize=1)  # needed twice: first for the normalisation, later for the arrays
def _read_released(path: str) -> convert.Source:
    return convert.read_released(path)
