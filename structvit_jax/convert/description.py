"""The description beside exported weights: model, class names and inputs, so that reading needs no options.

It is plain data: JSON in a .safetensors file, a dict in a .pth. Since a file may hold anything, a description
that is read is validated against the arrays of its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from structvit_jax.models.variants import OVERRIDES, get_variant
from structvit_jax.utils.errors import UserError

# Fields that describe how a program runs, not the weights.
_NOT_OF_WEIGHTS = ("dtype", "kernels", "remat")
_FIELDS = ("name", *(field for field in OVERRIDES if field not in _NOT_OF_WEIGHTS))
_LONGEST_NAME = 1000  # characters of a class name
_LONGEST_WORD = 100  # characters of an argument of a model
_Triple = tuple[float, float, float]


class Inputs(NamedTuple):
    """The inputs that weights expect."""

    mean: _Triple  # subtracted from channels scaled to 0..1
    std: _Triple  # then divided by
    channels: str = "rgb"  # or "bgr"


class Description(NamedTuple):
    """Model, class names and inputs of weights."""

    model: dict[str, Any]  # arguments of `get_variant`
    class_names: tuple[str, ...] | None  # in the order of the head's outputs; None if unknown
    inputs: Inputs | None  # None if unknown

    def as_plain(self, version: str) -> dict[str, Any]:
        """Return the description in plain types, with the version of the package that writes it."""
        return {
            "version": version,
            "model": {key: value for key, value in self.model.items() if key in _FIELDS},
            "class_names": self.class_names,
            "inputs": self.inputs and self.inputs._asdict(),
        }


def parse(plain: Any, facts: Mapping[str, Any], classes: int) -> Description:
    """Validate the description in a file.

    Args:
      plain: see `Description.as_plain`; may be anything.
      facts: fields of the variant that the shapes of the file's arrays determine.
      classes: number of outputs of the file's head.

    Raises:
      UserError: a description that is malformed, or does not fit the arrays.
    """
    if not isinstance(plain, Mapping):
        raise UserError("its description is not a mapping")
    return Description(
        _parse_model(plain.get("model"), facts),
        _parse_class_names(plain.get("class_names"), classes),
        _parse_inputs(plain.get("inputs")),
    )


def _parse_model(model: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(model, Mapping) or "name" not in model:
        raise UserError("its description does not name a model")
    if not isinstance(model["name"], str):
        raise UserError("its description has a name of the model that is not a string")
    arguments = {key: _parse_field(model[key]) for key in _FIELDS if key in model}
    variant = get_variant(**arguments)
    for key, value in facts.items():
        described = getattr(variant, key)
        if key in ("key_window", "value_window") and isinstance(described, int):
            described = (described,) * variant.grid_axes
        if key == "value_window" and variant.aggregation == "element":
            described = (1,) * variant.grid_axes
        if described != value:
            raise UserError(f"its description has {key} {described}, but its arrays have {value}")
    return arguments


def _parse_field(value: Any) -> Any:
    """Return a number, string or tuple of integers; lists of a few integers become tuples."""
    if isinstance(value, list | tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return tuple(value)
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _LONGEST_WORD):
        return value
    raise UserError("its description has an argument of the model that is not a number, word or short list")


def _parse_class_names(names: Any, classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError("its description has class names that are not a list of strings")
    check_class_names(names, classes)
    return tuple(names)


def check_class_names(names: Sequence[str], classes: int) -> None:
    """Raise UserError unless names are distinct, and as many as there are classes."""
    if len(names) != classes:
        raise UserError(f"there are {len(names)} class names for {classes} classes")
    if len(set(names)) < classes:
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"the class name {twice[:100]!r} occurs more than once")
    if any(len(name) > _LONGEST_NAME for name in names):
        raise UserError(f"a class name is longer than {_LONGEST_NAME} characters")


def _parse_inputs(inputs: Any) -> Inputs | None:
    if inputs is None:
        return None
    try:
        mean, std = (tuple(map(float, inputs[key])) for key in ("mean", "std"))
        channels = inputs["channels"]
        are_numbers = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
        if not are_numbers or channels not in ("rgb", "bgr"):
            raise ValueError
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError("its description of the inputs needs mean, std (above 0) and channels") from error
    return Inputs(cast(_Triple, mean), cast(_Triple, std), channels)
