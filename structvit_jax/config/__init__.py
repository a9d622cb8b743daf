"""The configuration: keys with defaults and ranges, the paper's recipes, values that depend on the data."""

from structvit_jax.config.keys import (
    INPUTS,
    KEYS,
    Key,
    check_config,
    default_config,
    describe_keys,
    get_value,
    keys_of,
    model_arguments,
    set_value,
    short,
)
from structvit_jax.config.values import Durations, durations, matching, steps_in

__all__ = [
    "INPUTS",
    "KEYS",
    "Durations",
    "Key",
    "check_config",
    "default_config",
    "describe_keys",
    "durations",
    "get_value",
    "keys_of",
    "matching",
    "model_arguments",
    "set_value",
    "short",
    "steps_in",
]
