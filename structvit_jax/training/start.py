"""Where a run starts: at its own latest checkpoint, from other weights, or from scratch.

Weights bring with them what they expect of their inputs; a configuration that does not say follows them.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_collections
from etils import epath
from jax.sharding import Mesh

from structvit_jax import convert
from structvit_jax.config import INPUTS, automatic, keys_of, model_arguments
from structvit_jax.models.variants import get_variant
from structvit_jax.models.weights import Weights, cast_like, split
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import io_errors_as_user_error
from structvit_jax.training.card import from_card, is_portable
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.restore import newest_card, open_card, open_checkpoint, rereading
from structvit_jax.training.run import Run, abstract_state, adopt_classes, as_json, check_data, differences
from structvit_jax.training.step import TrainState, init_state
from structvit_jax.utils.errors import UserError


def resolve_open_keys(config: ml_collections.ConfigDict, workdir: epath.Path) -> ml_collections.ConfigDict:
    """Return the configuration with open keys (None) filled in by what the run starts from.

    These are the keys of INPUTS, and those of `structvit_jax.config.automatic`. The workdir's newest
    checkpoint decides both. Without one, the keys of INPUTS are those that the weights of init_from expect,
    or the defaults, and the others stay open, for the data to decide. Opens no device and waits for no
    process.

    Raises:
      UserError: no weights at config.init_from, or such that something has to be said of them first.
    """
    inputs = [f"data.{key}" for key in INPUTS if config.data[key] is None]
    wanted = inputs + automatic.missing(config)
    if not wanted:
        return config
    with io_errors_as_user_error(workdir):
        card = newest_card(workdir)
    found: dict[str, Any] = {}
    if card:
        saved = from_card(card["config"], workdir)
        found = {key: value for key, value in keys_of(saved) if is_portable(key)}
    elif inputs and config.init_from and not _is_placeholder(config):
        found = {f"data.{key}": value for key, value in _inputs_of(config.init_from).items()}
    config = config.copy_and_resolve_references()
    for key in wanted:
        section, name = key.split(".")
        value = found.get(key)
        if value is None and key in inputs:
            value = INPUTS[name]
        if value is not None:
            config[section][name] = tuple(value) if isinstance(value, list) else value
    return config


def starting_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The latest checkpoint's state; without one, weights fitted from config.init_from, or fresh ones.

    Raises:
      UserError: a checkpoint or weights that do not fit.
    """
    if (latest := checkpoints.latest()) is not None:
        return _resumed(run, checkpoints, latest)
    weights = split(run.model)[1]
    if _is_placeholder(run.config):
        raise UserError(
            f"config.init_from: this recipe starts from {run.config.init_from.strip('<>')}; name a run, a"
            " checkpoint or a released file, or start from scratch with --config.init_from="
        )
    if run.config.init_from:
        weights = _fitted(run, weights)
    else:
        log("starting from scratch")
    return init_state(weights, run.optimizer, run.mesh, averaged=run.averages)


def _is_placeholder(config: ml_collections.ConfigDict) -> bool:
    """Return whether a recipe leaves open which weights it starts from, as "<ImageNet weights>"."""
    return config.init_from.startswith("<")


def _resumed(run: Run, checkpoints: Checkpoints, step: int) -> TrainState:
    where = f"{checkpoints.path(step)}, step {step} of {run.durations.total}"
    if step > run.durations.total:
        log(f"{where}: the checkpoint is already past the last step")
    else:
        log(f"resuming from {where}")
    checkpoints.check_resumable(step)
    card = checkpoints.card(step)
    adopt_classes(run.data, card)
    check_data(run, card, checkpoints.path(step), is_complete=step >= run.durations.total)
    _check_frozen(run, card, checkpoints.path(step))
    advice = "choose another --workdir, or the model that was saved"
    state = checkpoints.state(step, abstract_state(run), run.mesh, advice)
    for line in differences(card["config"], as_json(run.config)):
        log(f"note: {line}")
    return state


def _check_frozen(run: Run, card: dict[str, Any], path: epath.Path) -> None:
    saved, now = from_card(card["config"], path).optimizer.freeze, run.config.optimizer.freeze
    if saved != now:
        raise UserError(
            f"config.optimizer.freeze is {now!r}, and {path} was trained with {saved!r}: its optimizer has"
            f" state for other weights. Start another run from it: --config.init_from={path} --workdir=..."
        )


def _fitted(run: Run, fresh: Weights) -> Weights:
    """Return the weights of config.init_from in the model's shapes, and log what became of them."""
    source = find_weights(run.config.init_from, run.mesh)
    rules = convert.Rules(**run.config.init, seed=run.config.train.seed)
    names = tuple(run.data.class_names)
    adapted = convert.adapt(source, fresh.params | fresh.batch_stats, run.model.variant, names, rules)
    log(f"fine-tuning: starting at step 0 from the {source.model['name']} in {source.where}")
    for line in (*source.notes, *adapted.lines()):
        log(f"  {line}")
    for key, value in _described(source).items():
        if value is not None and list(value) != list(run.config.data[key]):
            now, theirs = (v if isinstance(v, str) else tuple(v) for v in (run.config.data[key], value))
            log(f"  note: config.data.{key} is {now!r}; the weights were trained with {theirs!r}")
    return cast_like(fresh, adapted.arrays)


@rereading
def find_weights(path: str, mesh: Mesh) -> convert.Source:
    """Return the weights that a path names: a released file, or a checkpoint.

    Raises:
      UserError: there are none, or they cannot be used.
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


@functools.lru_cache(maxsize=1)  # asked for its inputs first, then for its arrays
def _read_released(path: str) -> convert.Source:
    return convert.read_released(path)


def _inputs_of(path: str) -> dict[str, Any]:
    if convert.is_weights_file(path):
        return _described(_read_released(path))
    config = from_card(open_card(path)["config"], path)
    return {key: config.data[key] for key in INPUTS}


def _described(source: convert.Source) -> dict[str, Any]:
    return {key: getattr(source.inputs, key, None) for key in INPUTS}
