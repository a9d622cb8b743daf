"""The card of a checkpoint: what it may set, and what is checked before it is used.

A checkpoint may come from a stranger. Its card describes an experiment: the model, its inputs, its training
and its scoring. It never sets how this machine runs it: devices, caches of compiled code, processes, and
files that are fetched or written keep their defaults, which flags change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from structvit_jax.config import check_config, default_config, keys_of, model_arguments, short
from structvit_jax.models.variants import get_variant
from structvit_jax.utils.errors import UserError

# Every key of a configuration is in one of these two, as a section or as section.key.
PORTABLE = (
    *("init", "model", "augment", "train", "optimizer", "eval"),
    *(
        "data.name",
        "data.root",
        "data.train_split",
        "data.test_split",
        "data.val_fraction",
        "data.label_maps",
    ),
    *("data.batch_size", "data.train_examples", "data.test_examples"),
    *("data.max_unreadable_fraction", "data.max_replaced_frames"),
    *("data.mean", "data.std", "data.channels", "data.frames", "data.stride", "data.sampling"),
    *("data.size", "data.short_side", "data.crop_fraction", "data.test_clips", "data.test_crops"),
)
MACHINE = (*("init_from", "data.workers", "data.max_pixels", "data.max_frames", "checkpoint", "mesh"),)
_LOCAL = ("data.root", "data.label_maps")  # folders that are read; a card names them on local disks only

_TYPES: dict[type, tuple[type, ...]] = {  # in JSON, by the type of the default
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    tuple: (list,),
    type(None): (type(None), bool, int, float, str, list),  # a placeholder, which checks its own type
}


def is_portable(key: str) -> bool:
    """Whether a card may set a key, as "model.name"."""
    return key in PORTABLE or key.partition(".")[0] in PORTABLE


def from_card(
    saved: Mapping[str, Any], where: object, *, any_model: bool = False
) -> ml_collections.ConfigDict:
    """Return the configuration that a card describes: its portable keys, and defaults for all others.

    Keys that no longer exist are left out.

    Args:
      saved: the card's configuration, in plain types.
      where: the file that holds it, for error messages.
      any_model: whether a model that does not exist is accepted.

    Raises:
      UserError: a value of another type or out of range, or an unknown model.
    """
    config, values = default_config(), dict(keys_of(saved))
    for key, default in keys_of(default_config()):
        value = values.get(key, default)
        if key not in values or not is_portable(key) or (key in _LOCAL and "://" in str(value)):
            continue
        section, _, name = key.rpartition(".")
        try:
            if type(value) not in _TYPES[type(default)]:
                raise TypeError(f"{type(value).__name__} for {type(default).__name__}")
            config[section][name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where} is not valid: config.{key} cannot be {short(value)}") from error
    try:
        check_config(config)
        if not any_model:
            get_variant(**model_arguments(config))
    except UserError as error:
        raise UserError(f"{where} is not valid: {error}") from error
    return config


def check_card(card: Any, where: object) -> dict[str, Any]:
    """Return a card whose parts have the types that they should have.

    Args:
      card: what the file holds: {"class_names": names or None, "config": {...}, ...}.
      where: the file, for error messages.

    Raises:
      UserError: anything else.
    """
    problem = ""
    names = card.get("class_names", 0) if isinstance(card, dict) else 0
    config = card.get("config") if isinstance(card, dict) else None
    if not (names is None or _is_names(names)):
        problem = "class_names should be null or a list of names"
    elif not isinstance(config, dict) or not all(map(_is_section, config.values())):
        problem = "config should hold sections of plain values"
    elif not isinstance(config.get("model"), dict) or not isinstance(config["model"].get("name"), str):
        problem = "config.model.name is missing"
    if problem:
        raise UserError(f"{where} is not a valid card of a checkpoint: {problem}")
    return card


def _is_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _is_section(value: Any) -> bool:
    """Whether it is a value, or a section of values; a list of plain values is one."""
    if isinstance(value, dict):
        return all(_is_value(inner) for inner in value.values())
    return _is_value(value)


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(not isinstance(inner, list | dict) for inner in value)
    return not isinstance(value, dict)
