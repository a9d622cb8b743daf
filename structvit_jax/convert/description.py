"""The description that is saved with exported weights: their model, class names and inputs.

With it, the weights can be read without options. It is plain data: JSON in a .safetensors file, a dict in a
.pth. A file may hold anything, so descriptions are validated against the arrays of their file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from structvit_jax.models.variants import OVERRIDES, get_variant
from structvit_jax.utils.errors import UserError

# Arguments of a model that do not depend on its weights.
_RUNTIME_ARGUMENTS = ("dtype", "kernels", "remat")
_FIELDS = ("name", *(field for field in OVERRIDES if field not in _RUNTIME_ARGUMENTS))
_LONGEST_NAME = 1000  # characters of a class name
_LONGEST_ARGUMENT = 100  # characters of a string in the arguments of a model
_Triple = tuple[float, float, float]


class Inputs(NamedTuple):
    """The inputs that weights expect."""

    mean: _Triple  # subtracted from the channels, which are scaled to 0..1
    std: _Triple  # the channels are divided by it after that
    channels: str = "rgb"  # order of the channels, "rgb" or "bgr"


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
      plain: the result of `Description.as_plain`, or anything else that a file may hold.
      facts: fields of the variant that the shapes of the file's arrays determine.
      classes: number of outputs of the head in the file.

    Raises:
      UserError: the description is malformed, or does not fit the arrays.
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
        raise UserError("the name of the model in its description is not a string")
    arguments = {key: _parse_field(model[key]) for key in _FIELDS if key in model}
    variant = get_variant(**arguments)
    for key, value in facts.items():
        described = getattr(variant, key)
        if key in ("key_window", "value_window") and isinstance(described, int):
            described = (described,) * variant.grid_axes
        if key == "value_window" and variant.aggregation == "element":
            described = (1,) * variant.grid_axes
        if described != value:
            raise UserError(f"{key} is {described} in its description, but {value} in its arrays")
    return arguments


def _parse_field(value: Any) -> Any:
    """Return a number, string or tuple of integers; lists of a few integers become tuples."""
    if isinstance(value, list | tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return tuple(value)
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _LONGEST_ARGUMENT):
        return value
    raise UserError("an argument of the model in its description is not a number, short string or short list")


def _parse_class_names(names: Any, classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError("the class names in its description are not a list of strings")
    check_class_names(names, classes)
    return tuple(names)


def check_class_names(names: Sequence[str], classes: int) -> None:
    """Raise UserError unless there is one name for each class, all are distinct, and none is too long."""
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
        raise UserError(
            "the inputs in its description need mean, std (above 0) and channels (rgb or bgr)"
        ) from error
    return Inputs(cast(_Triple, mean), cast(_Triple, std), channels)
