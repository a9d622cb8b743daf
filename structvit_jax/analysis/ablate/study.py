"""The arms of an ablation (variants of a configuration), and the options of its runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from structvit_jax.config import check_config, model_arguments
from structvit_jax.models import get_variant
from structvit_jax.utils.errors import UserError, check_choice


class Arm(NamedTuple):
    """A variant of the configuration."""

    name: str
    changes: dict[str, Any]  # new values by configuration key, such as {"model.structure_dim": 4}

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("_")


class Study(NamedTuple):
    """The options of `structvit ablate`: the arms, and how each is trained and measured."""

    arms: Sequence[str]  # "NAME: key=value key=value", such as "D = 4: model.structure_dim=4"
    against: str = ""  # name of the arm that the others are compared with; "" for the first
    same_time: str = ""  # also train all arms for the training time of this arm; "" for no such runs
    lrs: Sequence[float] = ()  # peak learning rates to try for each arm; () for optimizer.lr only
    tune_seeds: int = 2  # runs per arm and learning rate, scored on validation examples
    seeds: int = 5  # runs per arm, scored on held-out test examples
    rounds: int = 5  # how often the time of a step is measured; the median is used


def parse_arms(config: ml_collections.ConfigDict, study: Study) -> list[Arm]:
    """Return the arms of a study.

    Raises:
      UserError: there are fewer than two arms, an arm is malformed, two arms have the same name, a key is
        unknown, or a model is invalid.
    """
    arms = [_parse_arm(text) for text in study.arms]
    if len(arms) < 2:
        raise UserError(
            "an ablation needs at least two arms: --arms='NAME: key=value'; see configs/ablate_digits.py"
        )
    if len({arm.folder for arm in arms}) < len(arms):
        raise UserError(f"--arms: the names of arms should differ: {', '.join(arm.name for arm in arms)}")
    for arm in arms:
        get_variant(**model_arguments(with_overrides(config, arm.changes)))
    for option, name in (("against", study.against), ("same_time", study.same_time)):
        if name:
            check_choice(f"arm in --{option}", name, [arm.name for arm in arms])
    return arms


def _parse_arm(text: str) -> Arm:
    name, colon, changes = str(text).partition(":")
    pairs = [change.partition("=") for change in changes.split()]
    if not colon or not name.strip() or not all(equals and value for _, equals, value in pairs):
        raise UserError(f"--arms={text!r} should be 'NAME: key=value key=value'")
    return Arm(name.strip(), {key: _parse_value(value) for key, _, value in pairs})


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def with_overrides(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Return a copy of a configuration with some values changed.

    Raises:
      UserError: a key is unknown, or does not accept its value.
    """
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        part = config[check_choice("section of the configuration", section, config)] if section else config
        check_choice(f"key of config.{section}", name, part)
        try:
            part[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key} does not take {value!r}: {error}") from error
    check_config(config)
    return config
