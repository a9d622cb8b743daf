"""The layers of UniFormer and DeiT, with PyTorch's initialisation and BatchNorm statistics.

Parameters are float32. `dtype` is the dtype of the computation; None means the dtype of the input, promoted
with that of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from structvit_jax.ops import convolve, depthwise_conv, layer_norm, linear, mlp

Dtype = DTypeLike | None
Initializer = Callable[..., jax.Array]  # (key: Key, shape, dtype) -> array
Key = jax.Array | np.random.Generator | None  # drawn from nnx.Rngs or NumpyRngs; None: initialise with zeros
Rngs = Any  # nnx.Rngs or NumpyRngs
Sides = Sequence[int]  # of windows or strides: one per axis of the grid


class NumpyRngs:
    """A replacement for `nnx.Rngs` that draws the weights of a network with NumPy.

    JAX compiles a program for every shape, which takes seconds in all; NumPy does not. It also gives the same
    weights on every backend. Without a seed, all weights are zero, which takes half the time.
    """

    def __init__(self, seed: int | None):
        self._rng = None if seed is None else np.random.default_rng(seed)

    def params(self) -> np.random.Generator | None:
        return None if self._rng is None else self._rng.spawn(1)[0]


def normal_init(std: float) -> Initializer:
    """Return a normal initialiser with mean 0 and standard deviation `std`."""
    return _initializer(
        lambda rng, shape: std * rng.standard_normal(shape, np.float32),
        lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype),
    )


def uniform_init(fan_in: int) -> Initializer:
    """Return PyTorch's default for convolutions, uniform in ±1 / sqrt(fan_in), for kernels and biases."""
    bound = 1.0 / math.sqrt(fan_in)
    return _initializer(
        lambda rng, shape: bound * (2 * rng.random(shape, np.float32) - 1),
        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
    )


def _initializer(by_numpy: Callable[..., np.ndarray], by_jax: Callable[..., jax.Array]) -> Initializer:
    def init(key: Key, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        if key is None:
            return jnp.zeros(shape, dtype)
        if isinstance(key, np.random.Generator):
            return jnp.asarray(by_numpy(key, shape), dtype)
        return by_jax(key, shape, dtype)

    return init


linear_init = normal_init(0.02)  # as timm's trunc_normal_(std=0.02), which truncates only at 100 sigma


def _promoted(dtype: Dtype, x: jax.Array, *params: nnx.Param) -> tuple[jax.Array, ...]:
    """Cast an input and parameters to the dtype of the computation."""
    return nnx.nn.dtypes.promote_dtype((x, *(param[...] for param in params)), dtype=dtype)


class Linear(nnx.Module):
    """A linear layer along the last axis."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        init: Initializer = linear_init,
        bias_init: Initializer = initializers.zeros,
        dtype: Dtype,
        rngs: Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), (outputs,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b *_ i"]) -> Float[Array, "b *_ o"]:
        return linear(*_promoted(self.dtype, x, self.kernel, self.bias))


class Pointwise(Linear):
    """A 1x1 (or 1x1x1) convolution, computed as a linear layer, with the initialisation of a convolution."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype, rngs: Rngs):
        init = uniform_init(inputs)
        super().__init__(inputs, outputs, init=init, bias_init=init, dtype=dtype, rngs=rngs)


class Conv(nnx.Module):
    """A dense convolution with a bias.

    Windows that are larger than the stride have zero padding on both sides, which centres them.
    """

    def __init__(self, inputs: int, outputs: int, *, window: Sides, strides: Sides, dtype: Dtype, rngs: Rngs):
        init = uniform_init(inputs * math.prod(window))
        self.kernel = nnx.Param(init(rngs.params(), (*window, inputs, outputs)))
        self.bias = nnx.Param(init(rngs.params(), (outputs,)))
        self.strides, self.dtype = tuple(strides), dtype
        self.padding = tuple((k - s + 1) // 2 for k, s in zip(window, strides, strict=True))

    def __call__(self, x: Float[Array, "b *grid i"]) -> Float[Array, "b *_ o"]:
        x, kernel, bias = _promoted(self.dtype, x, self.kernel, self.bias)
        return convolve(x, kernel, strides=self.strides, padding=self.padding) + bias


class DepthwiseConv(nnx.Module):
    """A depthwise convolution with an odd window, stride 1 and a bias."""

    def __init__(self, channels: int, *, window: Sides, dtype: Dtype, rngs: Rngs):
        init = uniform_init(math.prod(window))
        self.kernel = nnx.Param(init(rngs.params(), (*window, 1, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b *grid c"]) -> Float[Array, "b *grid c"]:
        x, kernel, bias = _promoted(self.dtype, x, self.kernel, self.bias)
        return depthwise_conv(x, kernel[..., 0, :, None], bias[:, None])[:, 0]


class BatchNorm(nnx.BatchNorm):
    """PyTorch's BatchNorm: momentum 0.1, eps 1e-5, running variance from the unbiased batch variance.

    Under `jax.jit` the statistics are those of the global batch, on any number of devices.
    """

    def __init__(self, channels: int, *, dtype: Dtype, rngs: Rngs):
        options: dict[str, Any] = {"use_running_average": True, "use_fast_variance": False}
        super().__init__(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs, **options)

    def __call__(self, x: Float[Array, "b *_ c"]) -> Float[Array, "b *_ c"]:  # type: ignore[override]
        decayed = self.momentum * self.var[...]  # Flax's momentum, 0.9, is the fraction that is kept
        y = super().__call__(x)
        if not self.use_running_average:
            count = x.size // x.shape[-1]
            self.var[...] = decayed + (self.var[...] - decayed) * (count / max(count - 1, 1))  # unbiased
        return y


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the channels."""

    def __init__(self, channels: int, *, epsilon: float, dtype: Dtype, rngs: Rngs):
        super().__init__(channels, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *_ c"]) -> Float[Array, "b *_ c"]:  # type: ignore[override]
        assert self.scale is not None and self.bias is not None
        return layer_norm(*_promoted(self.dtype, x, self.scale, self.bias), epsilon=self.epsilon)


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them; the hidden width is four times the input's."""

    def __init__(self, width: int, *, layer: type[Linear], dtype: Dtype, rngs: Rngs):
        self.fc1 = layer(width, 4 * width, dtype=dtype, rngs=rngs)
        self.fc2 = layer(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *_ c"]) -> Float[Array, "b *_ c"]:
        weights = self.fc1.kernel, self.fc1.bias, self.fc2.kernel, self.fc2.bias
        return mlp(*_promoted(self.fc1.dtype, x, *weights))


class DropPath(nnx.Module):
    """Stochastic depth: drop the residual branch of random examples, and divide the others by the keep rate.

    It is active in training mode (`model.train()`). A rate above 0 then needs a key.
    """

    def __init__(self) -> None:
        self.deterministic = True

    def __call__(self, x: Float[Array, " b *_"], rate: float, key: jax.Array | None) -> Float[Array, " b *_"]:
        if self.deterministic or not rate:
            return x
        if key is None:
            raise ValueError("a model in training mode with drop_path > 0 needs a key: model(x, key=...)")
        keep = jnp.asarray(1.0 - rate, x.dtype)
        mask = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x / keep, 0)
