"""Augmentation of batches on the device: random erasing, mixup and CutMix, as in timm.

Inputs are normalised, float [batch, [time,] height, width, channels]. Targets are distributions over classes,
[batch, classes]. All random numbers come from the key, so a batch is a function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

_ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def augment(
    key: jax.Array, inputs: jax.Array, targets: jax.Array, options: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Apply the section `augment` of a configuration; return inputs and targets."""
    erasing, mixing = jax.random.split(key)
    if options.erase:
        inputs = erase(erasing, inputs, options.erase)
    if options.mixup or options.cutmix:
        inputs, targets = mix(mixing, inputs, targets, options.mixup, options.cutmix)
    return inputs, targets


def erase(key: jax.Array, inputs: jax.Array, probability: float) -> jax.Array:
    """Apply random erasing in timm's "pixel" mode: a box of normal noise, the same box in all frames.

    The area of the box is 2 % to 33 % of the image, its aspect ratio log-uniform from 0.3 to 3.3. The first
    of ten draws that fits is used; if none does, nothing is erased.
    """
    batch, height, width = inputs.shape[0], *inputs.shape[-3:-1]
    whether, area, aspect, position, noise = jax.random.split(key, 5)
    shape = (batch, _ATTEMPTS)
    target = height * width * jax.random.uniform(area, shape, minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    low, high = jnp.log(jnp.array(_ERASED_ASPECT))
    ratio = jnp.exp(jax.random.uniform(aspect, shape, minval=low, maxval=high))
    heights, widths = jnp.round(jnp.sqrt(target * ratio)), jnp.round(jnp.sqrt(target / ratio))
    fits = (heights < height) & (widths < width)
    chosen = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(sides, chosen, axis=1) for sides in (heights, widths))
    erased = fits.any(axis=1, keepdims=True) & (jax.random.uniform(whether, (batch, 1)) < probability)
    corners = jax.random.uniform(position, (batch, 2))
    top, left = jnp.floor(corners[:, :1] * (height - h + 1)), jnp.floor(corners[:, 1:] * (width - w + 1))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = erased & (rows >= top) & (rows < top + h)
    inside = inside_rows[:, :, None] & ((columns >= left) & (columns < left + w))[:, None, :]
    inside = inside.reshape(batch, *[1] * (inputs.ndim - 4), height, width, 1)
    return jnp.where(inside, jax.random.normal(noise, inputs.shape, inputs.dtype), inputs)


def mix(
    key: jax.Array, inputs: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Apply mixup or CutMix to rows i and batch - 1 - i, with one lambda for all rows, as timm's batch mode.

    If both are on, each batch uses one of them with probability 1/2. Lambda is drawn from Beta(alpha, alpha);
    for CutMix it is corrected for boxes that are cut off at the edge.

    Args:
      key, inputs, targets: see the module.
      mixup, cutmix: their alphas; 0 is off.
    """
    coin, lam_key, position = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(coin, 0.5) if mixup and cutmix else jnp.array(cutmix > 0)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    lam = jax.random.beta(lam_key, alpha, alpha)
    height, width = inputs.shape[-3:-1]
    inside = box(box_edges(position, lam, height, width), height, width).astype(jnp.float32)
    weight = jnp.where(use_cutmix, 1.0 - inside[:, :, None], lam).astype(inputs.dtype)
    lam = jnp.where(use_cutmix, 1 - inside.mean(), lam)
    return (
        weight * inputs + (1 - weight) * inputs[::-1],
        lam * targets + (1 - lam) * targets[::-1],
    )


Edges = Sequence[tuple[jax.Array, jax.Array]]  # (first, last + 1) along height and along width


def box_edges(key: jax.Array, lam: jax.Array, height: int, width: int) -> Edges:
    """Return the edges of a box of 1 - lam of the image around a uniform centre, clipped to the image."""
    edges = []
    for axis_key, side in zip(jax.random.split(key), (height, width), strict=True):
        half = (jnp.floor(side * jnp.sqrt(1 - lam)) // 2).astype(jnp.int32)
        centre = jax.random.randint(axis_key, (), 0, side)
        edges.append((jnp.maximum(centre - half, 0), jnp.minimum(centre + half, side)))
    return edges


def box(edges: Edges, height: int, width: int) -> jax.Array:
    """Return which positions are inside a box: bool [height, width]."""
    inside = [
        (jnp.arange(side) >= low) & (jnp.arange(side) < high)
        for side, (low, high) in zip((height, width), edges, strict=True)
    ]
    return inside[0][:, None] & inside[1][None, :]
