"""The card of a checkpoint: write, check and compare its class names and its configuration.

A checkpoint may come from an untrusted source. Its card describes an experiment: the model, its inputs, its
training and its evaluation. It cannot set how this machine runs the experiment: the devices, the processes,
the cache of compiled code, and the files to fetch or write. These keep their defaults unless options of the
command line change them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

import structvit_jax
from structvit_jax.config import check_config, default_config, keys_of, model_arguments, set_value, short
from structvit_jax.models.variants import get_variant
from structvit_jax.runtime.storage import read_json
from structvit_jax.utils.errors import UserError

# Every key of a configuration is in one of these two lists, as a section or as section.key.
PORTABLE = (
    *("init", "model", "augment", "train", "optimizer", "eval"),
    *("data.name", "data.root", "data.train_split", "data.test_split", "data.val_fraction"),
    *("data.label_maps", "data.batch_size", "data.train_examples", "data.test_examples"),
    *("data.max_unreadable_fraction", "data.max_replaced_frames"),
    *("data.mean", "data.std", "data.channels", "data.frames", "data.stride", "data.sampling"),
    *("data.size", "data.short_side", "data.crop_fraction", "data.test_clips", "data.test_crops"),
)
MACHINE = (
    *("init_from", "checkpoint", "mesh"),
    *("data.workers", "data.cache", "data.cache_gib", "data.max_pixels", "data.max_frames"),
)
_LOCAL = ("data.root", "data.label_maps")  # folders to read; a card may not name remote ones
_TYPES: dict[type, tuple[type, ...]] = {  # type of a default -> types that its value may have in JSON
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    tuple: (list,),
    type(None): (type(None), bool, int, float, str, list),  # ConfigDict checks the type
}


def is_portable(key: str) -> bool:
    """Return whether a card may set a key, such as "model.name"."""
    return key in PORTABLE or key.partition(".")[0] in PORTABLE


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return a configuration in plain types."""
    return json.loads(config.to_json_best_effort())


def make_card(
    class_names: Sequence[str] | None,
    config: ml_collections.ConfigDict,
    scores: Mapping[str, object] | None,
    fingerprint: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the card of a checkpoint.

    Args:
      class_names: class names in the order of the model's outputs; None if unknown.
      config: configuration of the run.
      scores: scores of the evaluation after this step, if there was one.
      fingerprint: fingerprint of the data; None for weights that were trained elsewhere.
    """
    return {
        "class_names": None if class_names is None else list(class_names),
        "config": as_json(config),
        "metrics": scores,
        "version": structvit_jax.__version__,
        "data": fingerprint,
    }


def read_card(checkpoint: epath.Path) -> dict[str, Any]:
    """Read and check the card of a checkpoint.

    Args:
      checkpoint: the folder of its step.

    Raises:
      UserError: the card is missing or invalid.
    """
    path = checkpoint / "card" / "metadata"  # Orbax's name for the JSON of an item
    try:
        return check_card(read_json(path), path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {checkpoint} is no checkpoint of structvit_jax") from error


def from_card(
    saved: Mapping[str, Any], where: object, *, any_model: bool = False
) -> ml_collections.ConfigDict:
    """Return a configuration with the portable keys of a card, and defaults for all others.

    Keys that no longer exist are ignored.

    Args:
      saved: the card's configuration, in plain types.
      where: the card's file, for error messages.
      any_model: accept unknown models.

    Raises:
      UserError: a value has another type or is out of range, or the model is unknown.
    """
    config, defaults = default_config(), dict(keys_of(default_config()))
    for key, value in keys_of(saved):
        if key not in defaults or not is_portable(key) or (key in _LOCAL and "://" in str(value)):
            continue
        try:
            if type(value) not in _TYPES[type(defaults[key])]:
                raise TypeError
            set_value(config, key, tuple(value) if isinstance(value, list) else value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where} is not valid: config.{key} cannot be {short(value)}") from error
    try:
        check_config(config)
        if not any_model:
            get_variant(**model_arguments(config))
    except UserError as error:
        raise UserError(f"{where} is not valid: {error}") from error
    return config


def check_card(card: object, where: object) -> dict[str, Any]:
    """Check the types of the parts of a card, and return the card.

    Args:
      card: the content of the file: {"class_names": names or None, "config": {...}, ...}.
      where: the card's file, for error messages.

    Raises:
      UserError: a part is missing or has another type.
    """
    parts = card if isinstance(card, dict) else {}
    names, config = parts.get("class_names", ""), parts.get("config")
    is_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not (names is None or is_list):
        problem = "class_names should be null or a list of names"
    elif not isinstance(config, dict) or not _is_plain(config, sections=2):
        problem = "config should hold sections of plain values"
    elif not isinstance(config.get("model"), dict) or not isinstance(config["model"].get("name"), str):
        problem = "config.model.name is missing"
    else:
        return parts
    raise UserError(f"{where} is not a valid card of a checkpoint: {problem}")


def _is_plain(value: object, sections: int) -> bool:
    """Return whether a value is plain, a list of plain values, or nested in at most `sections` dicts."""
    if isinstance(value, dict):
        return sections > 0 and all(_is_plain(inner, sections - 1) for inner in value.values())
    return not (isinstance(value, list) and any(isinstance(inner, list | dict) for inner in value))


class Difference(NamedTuple):
    """A key whose values differ between two configurations."""

    key: str  # such as "train.seed"
    before: Any
    after: Any

    def describe(self) -> str:
        """Return one line for users."""
        return (
            f"config.{self.key} is now {short(self.after)}; the checkpoint was trained with"
            f" {short(self.before)}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, portable: bool = True) -> list[Difference]:
    """Return the keys that differ between two configurations in plain types, sorted.

    Args:
      old, new: see `as_json`; a key that is missing in one of them has the value None there.
      portable: skip keys that a card cannot set, see `is_portable`.
    """
    before, after = dict(keys_of(old)), dict(keys_of(new))
    return [
        Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and (is_portable(key) or not portable)
    ]
