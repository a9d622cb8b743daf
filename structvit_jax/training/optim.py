"""AdamW with UniFormer's decay rule, warm-up and cosine; which weights it trains, and each at what rate."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from structvit_jax.config import Durations, matching
from structvit_jax.ops.dispatch import current_device
from structvit_jax.utils.errors import UserError


class Optimizer(NamedTuple):
    """AdamW over the weights that are not frozen."""

    transform: optax.GradientTransformation
    frozen: frozenset[str] = frozenset()

    def trained(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arrays that it trains."""
        return {name: array for name, array in params.items() if name not in self.frozen}


def learning_rate(config: ml_collections.ConfigDict, durations: Durations) -> optax.Schedule:
    """Linear from `warmup_lr` to `lr`, then half a cosine that would reach `end_lr` after the last step, or
    before the cool-down. With stairs it stands still between them, and may lag behind by some."""
    warmup, stair = durations.warmup, durations.stair or 1
    first = warmup if config.schedule_origin == "warmup" else 0
    length = max(durations.total - durations.cooldown - first, 1)

    def rate(step):
        place = jnp.maximum(step // stair - config.lr_update_delay, 0) * stair
        ramp = config.warmup_lr + (config.lr - config.warmup_lr) * place / max(warmup, 1)
        turned = jnp.cos(jnp.pi * jnp.clip((place - first) / length, 0, 1))
        cosine = config.end_lr + (config.lr - config.end_lr) * (1 + turned) / 2
        return jnp.where(place < warmup, ramp, cosine)

    return rate


def decays(name: str, array: jax.Array) -> bool:
    """Weight decay spares vectors (biases, norms, layer scales) and DeiT's position table.

    Depthwise kernels decay, position encoding's included, as in the released UniFormer; so do the
    structure kernels, which the paper leaves open.
    """
    return array.ndim > 1 and name != "pos_embed"


def make_optimizer(
    config: ml_collections.ConfigDict, names: Collection[str] = (), depths: Sequence[int] = ()
) -> Optimizer:
    """AdamW's direction, after clipping by global norm where `clip_norm` is set.

    The step takes it times minus the learning rate, which is a function of the step alone.

    Args:
      config: the section `optimizer`.
      names: of all parameters, to freeze some or train layers at rates of their own.
      depths: blocks per stage.

    Raises:
      UserError: patterns of frozen weights that match none, or all.
    """
    frozen = frozen_names(config.freeze, list(names))
    adamw = [
        _adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: {name: decays(name, array) for name, array in params.items()},
        ),
    ]
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    rates = [] if config.layer_decay == 1 else [_scaled(layer_rates(names, depths, config.layer_decay))]
    return Optimizer(optax.chain(*clip, *adamw, *rates), frozen)


def frozen_names(patterns: str, names: Sequence[str]) -> frozenset[str]:
    """What config.optimizer.freeze means, see `matching`."""
    some = ", ".join(sorted({re.sub(r"\.\d+\..*", ".*", name) for name in names}))
    frozen = matching(patterns, names, f"config.optimizer.freeze: {{}} matches no weights, as {some}")
    if frozen and len(frozen) == len(names):
        raise UserError(f"config.optimizer.freeze is {patterns!r}, which leaves nothing to train")
    return frozenset(frozen)


def layer_rates(names: Iterable[str], depths: Sequence[int], decay: float) -> dict[str, float]:
    """Factors on the learning rate: 1 for the final norm and the heads, times `decay` for each block further
    down; an embedding goes with the block that follows, the first below all."""
    first = [sum(depths[:stage]) + 1 for stage in range(len(depths))]  # number of each stage's first block

    def layer(name):
        if not (match := re.match(r"(patch_embed|pos_embed|blocks)(\d?)(?:\.(\d+))?", name)):
            return sum(depths) + 1
        stage = int(match[2] or 1) - 1
        if match[1] == "blocks":
            return first[stage] + int(match[3])
        return first[stage] if stage else 0

    return {name: decay ** (sum(depths) + 1 - layer(name)) for name in names}


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax's, for steps that may leave all as it is. The weights change by the moments as they come out:
    CPUs would otherwise compute these twice, from copies of the old ones."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads, old, params=None, *, finite=True):
        new = jax.tree.map(functools.partial(jnp.where, finite), adam.update(grads, old)[1], old)
        if current_device().platform == "cpu":  # elsewhere one loop writes the moments and the weights
            new = jax.lax.optimization_barrier(new)
        mean = optax.tree.bias_correction(new.mu, b1, new.count)
        square = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _scaled(rates: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: {name: rates[name] * u for name, u in updates.items()})
