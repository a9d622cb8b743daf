"""Augmentation of batches on the device: random erasing, mixup, CutMix and MixToken.

Random erasing, mixup and CutMix follow timm. MixToken and targets for every position belong to token
labelling: they come from LV-ViT, and UniFormer uses them.

All functions take `key`, a JAX random key; `inputs`, normalised, float [batch, [time,] height, width,
channels]; and `targets`, distributions over classes, [batch, classes]. All random numbers come from the key,
so a batch is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections

_ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10  # boxes drawn per example
_SAMPLES = 2  # a label map is read at this many points along height and along width of each position

Edges = Sequence[tuple[jax.Array, jax.Array]]  # of a box: (first, last + 1) along height and along width


def augment(
    key: jax.Array, inputs: jax.Array, targets: jax.Array, options: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Apply random erasing, mixup and CutMix with the options of the section `augment`.

    Returns:
      The new inputs and targets.
    """
    erase_key, mix_key = jax.random.split(key)
    if options.erase:
        inputs = erase(erase_key, inputs, options.erase)
    if options.mixup or options.cutmix:
        inputs, targets = mix(mix_key, inputs, targets, options.mixup, options.cutmix)
    return inputs, targets


def erase(key: jax.Array, inputs: jax.Array, probability: float) -> jax.Array:
    """In some examples, fill a box with normal noise (timm's "pixel" mode), the same box in all frames.

    The area of the box is uniform from 2 % to 33 % of the image, its aspect ratio log-uniform from 0.3 to
    3.3. Ten boxes are drawn, and the first that fits into the image is used; if none does, nothing is erased.

    Args:
      key, inputs: see the module.
      probability: probability that an example is erased.
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
    """Mix row i with row batch - 1 - i by mixup or CutMix, with one lambda for all rows (timm's batch mode).

    If both are on, a batch uses either of them with probability 1/2. Lambda is drawn from Beta(alpha, alpha).
    CutMix clips its box at the edges of the image, and then sets lambda to the area fraction outside it.

    Args:
      key, inputs, targets: see the module.
      mixup, cutmix: alpha of mixup and of CutMix; 0 is off.
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


def box_edges(key: jax.Array, lam: jax.Array, height: int, width: int) -> Edges:
    """Return the edges of a box around a random centre, clipped at the edges of the image.

    Before clipping, the box covers the fraction 1 - lam of the image.
    """
    edges = []
    for axis_key, side in zip(jax.random.split(key), (height, width), strict=True):
        half = (jnp.floor(side * jnp.sqrt(1 - lam)) // 2).astype(jnp.int32)
        centre = jax.random.randint(axis_key, (), 0, side)
        edges.append((jnp.maximum(centre - half, 0), jnp.minimum(centre + half, side)))
    return edges


def box(edges: Edges, height: int, width: int) -> jax.Array:
    """Return the mask of a box, bool [height, width]."""
    inside = [
        (jnp.arange(side) >= low) & (jnp.arange(side) < high)
        for side, (low, high) in zip((height, width), edges, strict=True)
    ]
    return inside[0][:, None] & inside[1][None, :]


class MixToken:
    """Mix row i with row batch - 1 - i in a box of the output of the first patch embedding, as in LV-ViT.

    As in UniFormer's code, all rows have the same box, with lambda drawn from Beta(alpha, alpha). The targets
    of positions have a coarser grid, and the edges of the box are rounded down to it.
    """

    def __init__(self, key: jax.Array, alpha: float):
        self._key, self._alpha = key, alpha

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix an embedding [batch, [time,] height, width, channels]."""
        lam_key, position = jax.random.split(self._key)
        lam = jax.random.beta(lam_key, self._alpha, self._alpha)
        self._sides = x.shape[-3:-1]
        self._edges = box_edges(position, lam, *self._sides)
        return jnp.where(box(self._edges, *self._sides)[:, :, None], x[::-1], x)

    def targets(self, targets: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mix targets like the embedding. Mix the embedding first, since that draws the box.

        Args:
          targets: targets of the images, [batch, classes].
          dense: targets of the positions, [batch, ..., height, width, classes].
        """
        sides = dense.shape[-3:-1]
        ratios = [fine // coarse for fine, coarse in zip(self._sides, sides, strict=True)]
        edges = [(low // n, high // n) for (low, high), n in zip(self._edges, ratios, strict=True)]
        inside = box(edges, *sides)
        kept = 1 - inside.mean()
        dense = jnp.where(inside[:, :, None], dense[::-1], dense)
        return kept * targets + (1 - kept) * targets[::-1], dense


def dense_targets(batch: Mapping[str, jax.Array], grid: tuple[int, ...], classes: int) -> jax.Array:
    """Return the targets of all positions from a teacher's label maps, float32 [batch, *grid, classes].

    A map covers the whole image. It is interpolated bilinearly at points of the crop; it is zero outside the
    image. If the probabilities of a position sum to less than one, the rest is spread over all classes.

    Args:
      batch: with `map_classes` and `map_scores` [batch, height, width, k], and `pose` [batch, 2, 3], which
        maps a point (x, y, 1) of the crop to the image, with x and y from 0 to 1 in both.
      grid: number of positions along height and width.
      classes: number of classes.
    """
    scores, chosen = jnp.nan_to_num(batch["map_scores"].astype(jnp.float32)), batch["map_classes"]
    dense = jnp.einsum("bhwk,bhwkc->bhwc", scores, jax.nn.one_hot(chosen, classes))
    ys, xs = ((jnp.arange(n * _SAMPLES) + 0.5) / (n * _SAMPLES) for n in grid)
    points = jnp.stack([*jnp.meshgrid(xs, ys), jnp.ones((len(ys), len(xs)))], axis=-1)
    positions = jnp.einsum("bij,yxj->byxi", batch["pose"], points, precision="highest")
    inside = jnp.all((positions >= 0) & (positions <= 1), axis=-1).astype(jnp.float32)
    rows, columns = (_interpolation(positions[..., axis], dense.shape[2 - axis]) for axis in (1, 0))
    weights = jnp.einsum("byx,byxh,byxw->byxhw", inside, rows, columns)
    weights = weights.reshape(-1, grid[0], _SAMPLES, grid[1], _SAMPLES, *dense.shape[1:3]).mean(axis=(2, 4))
    read = jnp.einsum("byxhw,bhwc->byxc", weights, dense)
    return read + (1 - read.sum(axis=-1, keepdims=True)) / classes


def _interpolation(positions: jax.Array, cells: int) -> jax.Array:
    """Return the weight of each cell in a linear interpolation at positions 0..1: [...] -> [..., cells]."""
    centres = jnp.clip(positions * cells - 0.5, 0, cells - 1)
    return jnp.maximum(0, 1 - jnp.abs(centres[..., None] - jnp.arange(cells)))


def repeat_targets(targets: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Give every position the targets of its image: [batch, classes] -> `shape`, [batch, ..., classes]."""
    return jnp.broadcast_to(targets.reshape(len(targets), *[1] * (len(shape) - 2), -1), shape)
