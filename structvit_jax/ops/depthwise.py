"""Depthwise convolution over 2-D and 3-D grids, usable on every backend: which form, on which device.

Automatic differentiation is reverse mode only.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from structvit_jax.ops import depthwise_tpu, native
from structvit_jax.ops.depthwise_forms import FORMS
from structvit_jax.ops.devices import Target, target

METHODS = ("auto", "grouped", "library", "shifted", "padded", "banded", "native", "pallas")
_APART = ("padded", "banded", "native")  # each device's part for itself


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    method: str = "auto",
) -> jax.Array:
    """Convolves each channel with its own windows: cross-correlation, zero padding (k - 1) / 2.

    The same numbers as `lax.conv_general_dilated` with `feature_group_count=channels`, in another layout:
    the outputs that share their input channels are planes of their own.

    Args:
      x: [batch, *grid, channels], grid (height, width) or (time, height, width).
      kernel: [*window, channels, multiplier], odd windows.
      bias: [channels, multiplier], added to all places.
      stride: spatial stride; window centres lie at 0, S, 2S, ... in height and width, and on
        every frame in time.
      method: "grouped" is XLA's grouped convolution with our gradients, "library" with XLA's gradient of the
        kernel; "shifted" is the sum of shifted products as CPUs want it, "padded" as GPUs do; "banded" makes
        a window's taps along a row a matrix, for tensor cores; "native" is C++
        (float32 on CPUs where there is a compiler); "pallas" is as "grouped" with a kernel for TPUs
        (interpreted elsewhere) for both gradients where it has room and the stride is 1; "auto" takes what
        suits the platform and the shape.

    Returns:
      [batch, multiplier, *grid', channels] in x's dtype; grid' is ceil(n / stride) in space.

    Raises:
      ValueError: ranks or channels that do not fit, an even window, a stride below one, or a method that
        is unknown or cannot be had.
    """
    _check(x, kernel, bias, stride, method)
    where = target()
    if method == "auto" and where.platform == "tpu":
        method = "pallas"
    if method == "pallas" and (stride > 1 or x.dtype == jnp.float64 or not depthwise_tpu.fits(x, kernel)):
        method = "grouped"
    kernel, bias = jax.tree.map(lambda weights: weights.astype(x.dtype), (kernel, bias))
    return _traced_once(x, kernel, bias, stride, method, where)


def _check(x, kernel, bias, stride, method):
    if method not in METHODS:
        raise ValueError(f"depthwise_conv: method {method!r} is not one of {', '.join(METHODS)}")
    if x.ndim not in (4, 5) or kernel.ndim != x.ndim:
        raise ValueError(
            f"depthwise_conv: x {x.shape} and kernel {kernel.shape} should be [batch, *grid, channels]"
            " and [*window, channels, multiplier] with a grid of two or three axes"
        )
    *window, channels, _ = kernel.shape
    if channels != x.shape[-1]:
        raise ValueError(
            f"depthwise_conv: kernel {kernel.shape} does not fit {x.shape[-1]} channels;"
            " it should be [*window, channels, multiplier]"
        )
    if bias is not None and bias.shape != kernel.shape[-2:]:
        raise ValueError(
            f"depthwise_conv: bias {bias.shape} does not fit kernel {kernel.shape};"
            " it should be [channels, multiplier]"
        )
    if method == "native" and not native.takes(x):
        raise ValueError(f"depthwise_conv: 'native' is float32 (not {x.dtype}) and needs a C++ compiler")
    if any(k % 2 == 0 for k in window):
        raise ValueError(f"depthwise_conv: window {tuple(window)} has an even side; use odd ones")
    if stride < 1:
        raise ValueError(f"depthwise_conv: stride {stride} is below one")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _depthwise(x, kernel, bias, stride, method, where):
    return _form(method, "forward", where, kernel)(x, kernel, bias, stride=stride)


def _depthwise_fwd(x, kernel, bias, stride, method, where):
    return _depthwise(x, kernel, bias, stride, method, where), (x, kernel, bias)


def _depthwise_bwd(stride, method, where, residuals, cotangent):
    x, kernel, bias = residuals
    d_bias = None if bias is None else cotangent.sum(axis=(0, *range(2, cotangent.ndim - 1))).T
    if method == "pallas":
        return *_kernel_gradients(where, x, cotangent, kernel), d_bias
    gradients = (_form(method, which, where, kernel) for which in ("of_input", "of_kernel"))
    return *(gradient(x, kernel, cotangent, stride=stride) for gradient in gradients), d_bias


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)
_traced_once = jax.jit(_depthwise, static_argnums=(3, 4, 5))  # equal blocks share one trace


def _form(method, which, where, kernel):
    """Forward it takes a bias, too."""
    if method == "auto":
        return _suited_form(which, where, kernel)
    if method in _APART:
        form = functools.partial(_each_device, method, which, where)
    else:
        form = getattr(FORMS[method], which)
    return _plus_bias(form) if which == "forward" and method != "native" else form


def _plus_bias(form):
    def forward(x, kernel, bias, *, stride):
        out = form(x, kernel, stride=stride)
        return out if bias is None else out + bias.T.reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1])

    return forward


def _suited_form(which, where, kernel):
    """The definition is traced, too: `structvit_jax.performance.cost` counts its convolution."""
    platform, lowered_for = ("gpu", ("cuda", "rocm")) if where.platform == "gpu" else ("cpu", ("cpu",))
    if platform == "gpu":
        suited = _suits_gpus(which, kernel)
    else:
        suited = "native" if where.platform == "cpu" and native.takes(kernel) else "shifted"

    def form(*args, stride):
        forms = (_form(name, which, where, kernel) for name in (suited, "grouped"))
        best, plain = (functools.partial(form, stride=stride) for form in forms)
        return lax.platform_dependent(*args, default=plain, **dict.fromkeys(lowered_for, best))

    return form


def _suits_gpus(which, kernel):
    """As measured on an H100. cuDNN is fast at images with one kernel a channel, which is what gradients of
    the input are plane by plane: up to three times as fast as our forms, and at the rest a third to half as
    fast. Bands are two to seven times as fast as sums for 5x5x5 windows, and for gradients of kernels."""
    *window, _, planes = kernel.shape
    if len(window) == 2:
        return "library" if planes == 1 or which == "of_input" else "padded"
    banded = planes == 1 and kernel.dtype.itemsize == 2 and (which == "of_kernel" or math.prod(window) > 36)
    return "banded" if banded else "padded"


def _each_device(method, which, where: Target, x, kernel, *others, stride):
    """Each device works on its own examples."""
    function = functools.partial(getattr(FORMS[method], which), stride=stride)
    if where.platform == "gpu":
        function = _on_its_own(function)
    if which == "forward":
        return where.on_each_device(function, x, kernel, *others, whole=1 + len(others))
    (cotangent,) = others
    if which == "of_input":
        return where.on_each_device(
            lambda x, cotangent, kernel: function(x, kernel, cotangent), x, cotangent, kernel, whole=1
        )
    exact = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))  # sums are rounded when all are added
    parts = where.on_each_device(
        lambda x, cotangent, kernel: function(x, kernel, cotangent)[None], x, cotangent, exact, whole=1
    )
    return parts.sum(axis=0).astype(kernel.dtype)


def _on_its_own(function):
    """With channels last in memory, too: where the compiler may lay out an array as it likes, transpositions
    are free, and then the layout that suits one convolution spreads through the network. And fused with
    nothing that reads the result: it would search for tiles of all taps at once, for minutes."""

    def as_written(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def run(x, kernel, *cotangent):
        out = function(as_written(x), kernel, *map(as_written, cotangent))
        return as_written(lax.optimization_barrier(out))

    return run


def _kernel_gradients(where: Target, x, cotangent, kernel):
    def run(x, cotangent, kernel):
        d_x, d_kernel = depthwise_tpu.gradients(x, kernel, cotangent, interpret=where.interpret)
        return d_x, d_kernel[None]

    d_x, parts = where.on_each_device(run, x, cotangent, kernel, whole=1)
    return d_x, parts.sum(axis=0).astype(kernel.dtype)
