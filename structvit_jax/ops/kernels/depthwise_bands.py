"""Depthwise convolution as banded matrices, for the tensor cores of GPUs.

Along a row, a window is a banded matrix from the positions that are read to those that are computed. Rows are
cut into stretches, so that few entries of the matrix are zero. The stretches become features of a dense
grouped convolution over the other axes, with a group for every channel and stretch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from structvit_jax.ops.convolution import channels_last, grid_strides, same_padding
from structvit_jax.ops.kernels.depthwise_shifts import convolve_by_taps, input_gradient_by_taps, pad, pinned
from structvit_jax.ops.kernels.depthwise_xla import accumulator

# cuDNN is fast at groups of 16 or 32 features; at 56 it took eight times as long.
_STRETCH = 32  # positions that a stretch of a row reads


@dataclasses.dataclass(frozen=True)
class _Stretches:
    """How rows are cut."""

    count: int
    seen: int  # positions that each reads of a padded row; a power of two
    given: int  # positions that each computes
    step: int  # from one to the next, in positions read
    band: np.ndarray  # bool [seen, seen, taps]: the tap from a position read to one computed

    @classmethod
    def of(cls, across: int, taps: int, width: int, stride: int) -> _Stretches:
        """Cut rows padded to `across`, under a window of `taps` taps that computes `width` positions."""
        seen = 1 << (max(min(across, _STRETCH), taps, 8) - 1).bit_length()
        given = (seen - taps) // stride + 1
        places = np.arange(seen)
        band = places[:, None, None] == stride * places[:, None] + np.arange(taps)
        band &= (places < given)[:, None]
        return cls(-(-width // given), seen, given, given * stride, band)

    def features(self, padded: jax.Array) -> jax.Array:
        """[batch, *grid, across, channels] -> [batch, *grid, count · channels · seen]."""
        needed = (self.count - 1) * self.step + self.seen
        none = [(0, 0, 0)] * (padded.ndim - 3)
        rows = pad(padded, [*none, (0, needed - padded.shape[-2], 0)])
        cuts = [rows[..., i * self.step : i * self.step + self.seen, :] for i in range(self.count)]
        stacked = jnp.swapaxes(jnp.stack(cuts, axis=-3), -1, -2)
        return stacked.reshape(*stacked.shape[:-3], -1)


def _sum_of_bands(
    padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """Compute the result of `sum_of_shifts`, rounded to the type of `padded`."""
    cut, channels = _Stretches.of(padded.shape[-2], taps.shape[-2], grid[-1], strides[-1]), taps.shape[-1]
    band = jnp.asarray(cut.band, taps.dtype)
    matrices = jnp.einsum("...kc,ijk->...icj", taps, band, precision=lax.Precision.HIGHEST)
    matrices = jnp.repeat(matrices[..., None, :, :], cut.count, axis=-3)
    matrices = matrices.reshape(*matrices.shape[:-3], -1)
    out = _convolve_rows(cut.features(padded), matrices, strides[:-1], cut.count * channels)
    out = out.reshape(*out.shape[:-1], cut.count, channels, cut.seen)[..., : cut.given]
    return jnp.swapaxes(out, -1, -2).reshape(*out.shape[:-3], -1, channels)[..., : grid[-1], :]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Return the gradient of the matrices, summed along their bands."""
    *window, taps, channels, planes = kernel.shape
    padded = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    strides = grid_strides(kernel.shape[:-2], stride)
    width = cotangent.shape[-2]
    cut = _Stretches.of(padded.shape[-2], taps, width, stride)
    rows, groups = cut.features(padded), cut.count * channels
    whole = [(0, 0)] * (cotangent.ndim - 2) + [(0, cut.count * cut.given - width), (0, 0)]
    given = jnp.pad(cotangent, whole)
    given = jnp.swapaxes(given.reshape(*given.shape[:-2], cut.count, cut.given, channels), -1, -2)
    given = jnp.pad(given, [(0, 0)] * (given.ndim - 1) + [(0, cut.seen - cut.given)])
    given = given.reshape(*given.shape[:-3], -1)
    matrices = jnp.zeros((*window, cut.seen, groups * cut.seen), x.dtype)
    _, pull = jax.vjp(lambda matrices: _convolve_rows(rows, matrices, strides[:-1], groups), matrices)

    def of_plane(d: int) -> jax.Array:
        (found,) = pull(given[:, d])
        found = found.reshape(*window, cut.seen, cut.count, channels, cut.seen).astype(accumulator(x))
        band = jnp.asarray(cut.band, found.dtype)
        return jnp.einsum("...iscj,ijk->...kc", found, band, precision=lax.Precision.HIGHEST)

    return jnp.stack([of_plane(d) for d in range(planes)], axis=-1).astype(kernel.dtype)


def _convolve_rows(rows: jax.Array, matrices: jax.Array, strides: Sequence[int], groups: int) -> jax.Array:
    """[batch, *grid, groups · seen], [*window, seen, groups · given] -> [batch, *grid', groups · given]."""
    return lax.conv_general_dilated(
        rows,
        matrices,
        strides,
        "VALID",
        dimension_numbers=channels_last(len(strides)),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )


banded = pinned(functools.partial(convolve_by_taps, pad=pad, total=_sum_of_bands))
banded_input_gradient = pinned(functools.partial(input_gradient_by_taps, pad=pad, total=_sum_of_bands))
banded_kernel_gradient = pinned(_kernel_gradient)
