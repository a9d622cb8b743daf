"""Convolutions whose windows become channels against XLA's convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.ops import convolve, kernels
from structvit_jax.ops.kernels.target import Device


@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding"),
    [
        ((2, 9, 8, 3), (4, 4), (4, 4), (0, 0)),  # as the first embedding of images; a row is left over
        ((2, 5, 9, 11, 3), (3, 4, 4), (2, 4, 4), (1, 0, 0)),  # of video
        ((1, 4, 8, 6, 3), (2, 4, 3), (2, 4, 3), (0, 0, 0)),  # tubelets
        ((2, 7, 9, 3), (3, 3), (2, 2), (1, 1)),  # overlapping
        ((2, 6, 7, 12), (2, 2), (2, 2), (0, 0)),  # many channels
        ((1, 4, 7, 6, 12), (1, 2, 2), (1, 2, 2), (0, 0, 0)),
        ((1, 5, 7, 6, 9), (3, 1, 3), (1, 2, 3), (1, 0, 1)),  # some overlapping, some with gaps
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_convolve_equals_the_convolution_of_xla(x64, monkeypatch, platform, shape, window, strides, padding):
    monkeypatch.setattr(kernels, "current_device", lambda: Device(platform, "absent"))
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s)) for s in (shape, (*window, shape[-1], 5)))
    axes = "THW"[-len(window) :]

    def definition(x, kernel):
        numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
        zeros = [(p, p) for p in padding]
        return jax.lax.conv_general_dilated(x, kernel, strides, zeros, dimension_numbers=numbers)

    def values_and_gradients(function):
        out, pull = jax.vjp(function, x, kernel)
        return out, *pull(jnp.sin(out))

    ours = values_and_gradients(lambda x, kernel: convolve(x, kernel, strides=strides, padding=padding))
    for a, b in zip(ours, values_and_gradients(definition), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
