"""The layers of UniFormer and DeiT, with PyTorch's initialisation and statistics where they matter.

Every layer follows its `dtype` for computing and keeps float32 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from structvit_jax.ops import convolve, depthwise_conv, mlp
from structvit_jax.ops.devices import target


class NumpyRngs:
    """Stands in for `nnx.Rngs` when a whole network is built: weights are drawn by NumPy, which needs
    no compilation per shape (seconds) and gives the same weights on every backend. Without a seed nothing is
    drawn (half the time)."""

    def __init__(self, seed: int | None):
        self._rng = _ZeroInit(np.random.PCG64(0)) if seed is None else np.random.default_rng(seed)

    def params(self) -> np.random.Generator:
        return self._rng.spawn(1)[0]


class _ZeroInit(np.random.Generator):
    """Gives zeros, for weights that others will take the place of."""

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        return np.zeros(size, dtype)

    random = standard_normal


def normal_init(std: float) -> Callable:
    """Normal with deviation `std`, drawn from a JAX key or a NumPy generator."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        if isinstance(key, np.random.Generator):
            return jnp.asarray(std * key.standard_normal(shape, np.float32), dtype)
        return std * jax.random.normal(key, shape, dtype)

    return init


def uniform_init(fan_in: int) -> Callable:
    """torch's default for convolution kernels and biases: uniform within 1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        if isinstance(key, np.random.Generator):
            return jnp.asarray(bound * (2 * key.random(shape, np.float32) - 1), dtype)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


linear_init = normal_init(0.02)  # timm's trunc_normal_(std=0.02) cuts at 100 sigma: a normal


class Linear(nnx.Linear):
    """[..., in] -> [..., out]."""

    def __init__(
        self, inputs: int, outputs: int, *, init=linear_init, bias_init=initializers.zeros, dtype, rngs
    ):
        super().__init__(inputs, outputs, kernel_init=init, bias_init=bias_init, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        x = inputs
        if target().platform == "cpu":  # which transpose maps slowly, for the gradients of kernels
            x = x.reshape(-1, x.shape[-1])
        return super().__call__(x, out_sharding).reshape(*inputs.shape[:-1], -1)


class Pointwise(Linear):
    """A 1x1 (or 1x1x1) convolution, computed as the matrix product that it is."""

    def __init__(self, inputs: int, outputs: int, *, dtype, rngs):
        init = uniform_init(inputs)
        super().__init__(inputs, outputs, init=init, bias_init=init, dtype=dtype, rngs=rngs)


class Conv(nnx.Conv):
    """A dense convolution with explicit zero padding on both sides."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        window: Sequence[int],
        strides: Sequence[int],
        padding: Sequence[int],
        dtype,
        rngs,
    ):
        init = uniform_init(inputs * math.prod(window))
        super().__init__(
            inputs,
            outputs,
            tuple(window),
            tuple(strides),
            padding=tuple((p, p) for p in padding),
            kernel_init=init,
            bias_init=init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        arrays = inputs, self.kernel[...], self.bias[...]  # type: ignore[index]  # it has one
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(arrays, dtype=self.dtype)
        return convolve(x, kernel, strides=self.strides, padding=[zeros for zeros, _ in self.padding]) + bias


class DepthwiseConv(nnx.Module):
    """One odd window per channel and a bias, stride 1: [batch, *grid, channels] -> the same."""

    def __init__(self, channels: int, *, window: Sequence[int], dtype, rngs: nnx.Rngs):
        init = uniform_init(math.prod(window))
        self.kernel = nnx.Param(init(rngs.params(), (*window, 1, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, bias = nnx.nn.dtypes.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        return depthwise_conv(x, kernel[..., 0, :, None], bias[:, None])[:, 0]


class BatchNorm(nnx.BatchNorm):
    """torch's BatchNorm: momentum 0.1, eps 1e-5, running variance from the unbiased batch variance.

    Under `jax.jit` the statistics are those of the global batch, on any number of devices.
    """

    def __init__(self, channels: int, *, dtype, rngs):
        super().__init__(
            channels,
            use_running_average=True,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x, use_running_average=None, *, mask=None) -> jax.Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        old = self.var[...]
        y = super().__call__(x, use_running_average, mask=mask)
        if not use_running_average:
            count = x.size // x.shape[-1]
            kept = self.momentum * old
            self.var[...] = kept + (self.var[...] - kept) * (count / max(count - 1, 1))
        return y


class LayerNorm(nnx.LayerNorm):
    """[..., channels] -> the same."""

    def __init__(self, channels: int, *, epsilon: float, dtype, rngs):
        super().__init__(channels, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)

    def __call__(self, x, *, mask=None) -> jax.Array:
        shape = x.shape
        if target().platform == "gpu":  # the compiler tries thousands of tiles for a grid, few for a row
            x = x.reshape(len(x), -1, shape[-1])
        return super().__call__(x, mask=mask).reshape(shape)


class Mlp(nnx.Module):
    """Layer, exact GELU, layer, with a hidden width of four."""

    def __init__(self, width: int, *, layer: type[Linear], dtype, rngs: nnx.Rngs):
        self.fc1 = layer(width, 4 * width, dtype=dtype, rngs=rngs)
        self.fc2 = layer(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = []
        for layer in (self.fc1, self.fc2):
            weights += [layer.kernel[...], layer.bias[...]]  # type: ignore[index]  # they have one
        return mlp(*nnx.nn.dtypes.promote_dtype((x, *weights), dtype=self.fc1.dtype))


class DropPath(nnx.Module):
    """Stochastic depth: drops a residual branch per example, survivors divided by the keep rate.

    Active after `model.train()`; then a rate that is not 0 needs a key.
    """

    def __init__(self):
        self.deterministic = True

    def __call__(self, x: jax.Array, rate: ArrayLike | None, key: jax.Array | None) -> jax.Array:
        if self.deterministic or rate is None or (isinstance(rate, float) and not rate):
            return x
        if key is None:
            raise ValueError("a model in training mode with drop_path > 0 needs a key: model(x, key=...)")
        keep = jnp.asarray(1.0 - rate, x.dtype)
        mask = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x / keep, 0)
