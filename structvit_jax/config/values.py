"""Text values of a configuration: durations, such as "90 epochs", and lists of patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from typing import NamedTuple

import ml_collections

from structvit_jax.config.keys import get_value, short
from structvit_jax.utils.errors import UserError


class Durations(NamedTuple):
    """The configured durations in steps; 0 means never."""

    total: int
    warmup: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_every: int = 0
    cooldown: int = 0
    lr_update_every: int = 0


def durations(config: ml_collections.ConfigDict, rows_per_epoch: int) -> Durations:
    """Return all durations of a configuration in steps.

    Args:
      config: see `structvit_jax.config.KEYS`.
      rows_per_epoch: number of rows in all batches of an epoch, copies by repeated augmentation included.

    Raises:
      UserError: a malformed duration, a run without steps, or a warm-up or cool-down longer than the run.
    """

    def steps(key: str) -> int:
        return steps_in(get_value(config, key), f"config.{key}", config.data.batch_size, rows_per_epoch)

    result = Durations(
        total=steps("train.duration"),
        warmup=steps("optimizer.warmup"),
        eval_every=steps("eval.every"),
        save_every=steps("checkpoint.every"),
        keep_every=steps("checkpoint.keep_every"),
        cooldown=steps("optimizer.cooldown"),
        lr_update_every=steps("optimizer.lr_update_every"),
    )
    if result.total < 1:
        raise UserError(
            f"config.train.duration is {config.train.duration!r}; it needs to be at least one step"
        )
    if result.warmup + result.cooldown > result.total:
        key, part = ("cooldown", result.cooldown) if result.cooldown else ("warmup", result.warmup)
        raise UserError(
            f"config.optimizer.{key} is {part} steps, too long for a run of {result.total} steps; shorten it"
            f" with --config.optimizer.{key}='N steps'"
        )
    return result


def steps_in(duration: str, key: str, batch_size: int, rows_per_epoch: int) -> int:
    """Return the number of steps in "N steps", "N epochs" or "N examples", rounded; "" means 0.

    A duration above zero has at least one step. Examples are counted as rows of batches, so copies by
    config.augment.repeated_augmentation count too.

    Raises:
      UserError: a malformed or excessive duration; the message names `key`.
    """
    if not duration:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(steps?|epochs?|examples?)\s*", duration)
    if not match:
        raise UserError(f"{key} is {short(duration)}; write 'N steps', 'N epochs' or 'N examples'")
    number, unit = float(match[1]), match[2].rstrip("s")
    per_unit = {"step": 1.0, "epoch": rows_per_epoch / batch_size, "example": 1 / batch_size}[unit]
    if not number * per_unit < 2**31:
        raise UserError(f"{key} is {short(duration)}; use fewer than 2**31 steps")
    return max(round(number * per_unit), 1 if number else 0)


def matching(patterns: str, names: Collection[str], message: str) -> set[str]:
    """Return the names that comma-separated shell patterns select, see config.optimizer.freeze.

    Later patterns win. A pattern that starts with "!" deselects.

    Args:
      patterns: such as "blocks1.*,!*.bias".
      names: the names to select from.
      message: error message for a pattern that matches nothing; "{}" in it is replaced by the pattern.

    Raises:
      UserError: a pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not matched:
            raise UserError(message.format(repr(pattern)))
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    return chosen
