"""Depthwise convolution as banded matrices, for the tensor cores of GPUs.

Along a row, the convolution is a product with a banded matrix, from input positions to output positions.
Rows are cut into overlapping segments, so that fewer entries of the matrix are zero. The positions of a
segment become the features of a dense grouped convolution over the other axes, with one group per channel and
segment.
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
_SEGMENT = 32  # input positions of a segment


@dataclasses.dataclass(frozen=True)
class _Segments:
    """How the rows of a convolution are cut into segments."""

    count: int  # segments per row
    inputs: int  # positions of a padded row that a segment reads; a power of two
    outputs: int  # positions that it computes, at most `inputs`
    step: int  # distance between two segments, in input positions
    band: np.ndarray  # bool [inputs, inputs (outputs, padded), taps]: the tap that connects two positions

    @classmethod
    def of(cls, padded_width: int, taps: int, width: int, stride: int) -> _Segments:
        """Cut rows of `padded_width` inputs, from which a window of `taps` taps computes `width` outputs."""
        inputs = 1 << (max(min(padded_width, _SEGMENT), taps, 8) - 1).bit_length()
        outputs = (inputs - taps) // stride + 1
        positions = np.arange(inputs)
        band = positions[:, None, None] == stride * positions[:, None] + np.arange(taps)
        band &= (positions < outputs)[:, None]
        return cls(-(-width // outputs), inputs, outputs, outputs * stride, band)

    def features(self, padded: jax.Array) -> jax.Array:
        """Cut rows: [batch, *grid, padded width, channels] -> [batch, *grid, count · channels · inputs]."""
        needed = (self.count - 1) * self.step + self.inputs
        none = [(0, 0, 0)] * (padded.ndim - 3)
        rows = pad(padded, [*none, (0, needed - padded.shape[-2], 0)])
        cuts = [rows[..., i * self.step : i * self.step + self.inputs, :] for i in range(self.count)]
        stacked = jnp.swapaxes(jnp.stack(cuts, axis=-3), -1, -2)
        return stacked.reshape(*stacked.shape[:-3], -1)


def _sum_of_bands(
    padded: jax.Array, taps: jax.Array, grid: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """Compute `sum_of_shifts`, rounded to the dtype of `padded`."""
    segments, channels = _Segments.of(padded.shape[-2], taps.shape[-2], grid[-1], strides[-1]), taps.shape[-1]
    band = jnp.asarray(segments.band, taps.dtype)
    matrices = jnp.einsum("...kc,ijk->...icj", taps, band, precision=lax.Precision.HIGHEST)
    matrices = jnp.repeat(matrices[..., None, :, :], segments.count, axis=-3)
    matrices = matrices.reshape(*matrices.shape[:-3], -1)
    out = _convolve_rows(segments.features(padded), matrices, strides[:-1], segments.count * channels)
    out = out.reshape(*out.shape[:-1], segments.count, channels, segments.inputs)[..., : segments.outputs]
    return jnp.swapaxes(out, -1, -2).reshape(*out.shape[:-3], -1, channels)[..., : grid[-1], :]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Return the gradient of the kernel: that of the banded matrices, summed along each band."""
    *window, taps, channels, multiplier = kernel.shape
    padded = jnp.pad(x, [(0, 0), *same_padding(kernel.shape[:-2]), (0, 0)])
    strides = grid_strides(kernel.shape[:-2], stride)
    width = cotangent.shape[-2]
    segments = _Segments.of(padded.shape[-2], taps, width, stride)
    rows, groups = segments.features(padded), segments.count * channels
    whole = [(0, 0)] * (cotangent.ndim - 2) + [(0, segments.count * segments.outputs - width), (0, 0)]
    cotangents = jnp.pad(cotangent, whole)
    cotangents = jnp.swapaxes(
        cotangents.reshape(*cotangents.shape[:-2], segments.count, segments.outputs, channels), -1, -2
    )
    cotangents = jnp.pad(
        cotangents, [(0, 0)] * (cotangents.ndim - 1) + [(0, segments.inputs - segments.outputs)]
    )
    cotangents = cotangents.reshape(*cotangents.shape[:-3], -1)
    matrices = jnp.zeros((*window, segments.inputs, groups * segments.inputs), x.dtype)
    _, pull = jax.vjp(lambda matrices: _convolve_rows(rows, matrices, strides[:-1], groups), matrices)

    def of_kernel(d: int) -> jax.Array:
        (found,) = pull(cotangents[:, d])
        found = found.reshape(*window, segments.inputs, segments.count, channels, segments.inputs)
        found = found.astype(accumulator(x))
        band = jnp.asarray(segments.band, found.dtype)
        return jnp.einsum("...iscj,ijk->...kc", found, band, precision=lax.Precision.HIGHEST)

    return jnp.stack([of_kernel(d) for d in range(multiplier)], axis=-1).astype(kernel.dtype)


def _convolve_rows(rows: jax.Array, matrices: jax.Array, strides: Sequence[int], groups: int) -> jax.Array:
    """Convolve [batch, *grid, groups · n] with [*window, n, groups · n] to [batch, *grid', groups · n]."""
    return lax.conv_general_dilated(
        rows,
        matrices,
        strides,
        "VALID",
        dimension_numbers=channels_last(len(strides)),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )


banded = pinned(functools.partial(convolve_by_taps, pad=pad, sum_over_taps=_sum_of_bands))
banded_input_gradient = pinned(
    functools.partial(input_gradient_by_taps, pad=pad, sum_over_taps=_sum_of_bands)
)
banded_kernel_gradient = pinned(_kernel_gradient)
