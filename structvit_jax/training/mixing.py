"""Augmentation of whole batches on the device: random erasing, mixup and cutmix.

Inputs are normalised, float [batch, [time,] height, width, channels]; targets are distributions over
classes, [batch, classes]. Every draw comes from the key, so a batch is a function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_ERASED_AREA = (0.02, 1 / 3)  # share of the picture
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def augment(
    key: jax.Array, inputs: jax.Array, targets: jax.Array, options: Any
) -> tuple[jax.Array, jax.Array]:
    """Applies what the section `augment` of a configuration asks for; returns inputs and targets."""
    erasing, mixing = jax.random.split(key)
    if options.erase:
        inputs = erase(erasing, inputs, options.erase)
    if options.mixup or options.cutmix:
        inputs, targets = mix(mixing, inputs, targets, options.mixup, options.cutmix)
    return inputs, targets


def erase(key: jax.Array, inputs: jax.Array, probability: float) -> jax.Array:
    """Random erasing, timm's "pixel" mode: a box of normal noise, the same box in all frames.

    The box takes 2 % to 33 % of the picture, its aspect from 0.3 to 3.3 log-uniform; the first of ten draws
    that fits is taken, and none if none does.
    """
    batch, height, width = inputs.shape[0], *inputs.shape[-3:-1]
    whether, area, aspect, place, noise = jax.random.split(key, 5)
    shape = (batch, _ATTEMPTS)
    target = height * width * jax.random.uniform(area, shape, minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    low, high = jnp.log(jnp.array(_ERASED_ASPECT))
    ratio = jnp.exp(jax.random.uniform(aspect, shape, minval=low, maxval=high))
    heights, widths = jnp.round(jnp.sqrt(target * ratio)), jnp.round(jnp.sqrt(target / ratio))
    fits = (heights < height) & (widths < width)
    chosen = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(sides, chosen, axis=1) for sides in (heights, widths))
    erased = fits.any(axis=1, keepdims=True) & (jax.random.uniform(whether, (batch, 1)) < probability)
    spots = jax.random.uniform(place, (batch, 2))
    top, left = jnp.floor(spots[:, :1] * (height - h + 1)), jnp.floor(spots[:, 1:] * (width - w + 1))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = erased & (rows >= top) & (rows < top + h)
    inside = inside_rows[:, :, None] & ((columns >= left) & (columns < left + w))[:, None, :]
    inside = inside.reshape(batch, *[1] * (inputs.ndim - 4), height, width, 1)
    return jnp.where(inside, jax.random.normal(noise, inputs.shape, inputs.dtype), inputs)


def mix(
    key: jax.Array, inputs: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup or cutmix of row i with row batch - 1 - i, one share for all rows, as timm's batch mode.

    Where both are on, a coin decides for each batch. The share is drawn from Beta(alpha, alpha); cutmix
    corrects it for a box that reaches over the edge.
    """
    coin, share, place = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(coin, 0.5) if mixup and cutmix else jnp.array(cutmix > 0)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    share = jax.random.beta(share, alpha, alpha)
    height, width = inputs.shape[-3:-1]
    inside = box(box_edges(place, share, height, width), height, width).astype(jnp.float32)
    weight = jnp.where(use_cutmix, 1.0 - inside[:, :, None], share).astype(inputs.dtype)
    share = jnp.where(use_cutmix, 1 - inside.mean(), share)
    return (
        weight * inputs + (1 - weight) * inputs[::-1],
        share * targets + (1 - share) * targets[::-1],
    )


Edges = Sequence[tuple[jax.Array, jax.Array]]  # first and behind the last, along height and width


def box_edges(key: jax.Array, share: jax.Array, height: int, width: int) -> Edges:
    """Edges of a box of 1 - share of the picture around a uniform centre, cut off at the picture's."""
    edges = []
    for axis_key, side in zip(jax.random.split(key), (height, width), strict=True):
        half = (jnp.floor(side * jnp.sqrt(1 - share)) // 2).astype(jnp.int32)
        centre = jax.random.randint(axis_key, (), 0, side)
        edges.append((jnp.maximum(centre - half, 0), jnp.minimum(centre + half, side)))
    return edges


def box(edges: Edges, height: int, width: int) -> jax.Array:
    """A box as bool [height, width]."""
    inside = [
        (jnp.arange(side) >= low) & (jnp.arange(side) < high)
        for side, (low, high) in zip((height, width), edges, strict=True)
    ]
    return inside[0][:, None] & inside[1][None, :]
