"""C++ kernels for CPUs (cpu/*.cc): attention and depthwise convolution in float32.

The C++ compiler of the machine builds them on first use, see `structvit_jax.utils.native_library`. If this
fails, `available` returns False and kernels in JAX run instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from structvit_jax.ops.kernels import attention_xla, depthwise_xla
from structvit_jax.utils import native_library

_FOLDER = Path(__file__).with_name("cpu")
_OPERATIONS = (
    "attention_forward",
    "attention_backward",
    "depthwise_forward",
    "depthwise_input_gradient",
    "depthwise_kernel_gradient",
)


@functools.cache
def available() -> bool:
    """Return whether the library can be used; the first call builds it, in about ten seconds."""
    include, sources = Path(jax.ffi.include_dir()), sorted(_FOLDER.glob("*.cc"))
    headers = [*sorted(_FOLDER.glob("*.h")), include / "xla/ffi/api/c_api.h"]
    try:
        library = native_library.load(
            "ops", sources, ["-ffp-contract=fast"], include=include, headers=headers
        )
    except native_library.FAILURES:
        return False
    for name in _OPERATIONS:
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"structvit_{name}", target, platform="cpu")
    return True


def supports(x: jax.Array, *_: jax.Array | None, **options: int) -> bool:
    """Return whether the arrays are float32 and the library is available."""
    return x.dtype == jnp.float32 and available()


def attention_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int
) -> tuple[jax.Array, jax.Array]:
    """Return the output and lse (see `attention_xla.with_gradients`)."""
    batch, count, _ = query.shape
    shapes = query.shape, (batch, heads, count)
    output, lse = _call("attention_forward", shapes, query, key, value, heads=heads)
    return output, lse


def attention_backward(
    residuals: attention_xla.Residuals, cotangent: jax.Array, *, heads: int
) -> attention_xla.Gradients:
    """Return the gradients of query, key and value."""
    query, key, value, output, lse = residuals
    shapes = query.shape, key.shape, value.shape
    args = query, key, value, output, cotangent, lse
    d_query, d_key, d_value = _call("attention_backward", shapes, *args, heads=heads)
    return d_query, d_key, d_value


attention = attention_xla.with_gradients(attention_forward, attention_backward)


def depthwise_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, stride: int) -> jax.Array:
    """Return the convolution [batch, D, *grid', channels], with the bias added."""
    batch, *frames, height, width, channels = x.shape
    shape = batch, kernel.shape[-1], *frames, -(-height // stride), -(-width // stride), channels
    start = jnp.zeros(kernel.shape[-2:], jnp.float32) if bias is None else bias
    return _call("depthwise_forward", [shape], x, kernel, start, stride=stride)[0]


def depthwise_input_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    """Return the gradient of x; only the shape of x is used."""
    return _call("depthwise_input_gradient", [x.shape], cotangent, kernel, stride=stride)[0]


def depthwise_kernel_gradient(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> jax.Array:
    """Return the gradient of the kernel; only the shape of the kernel is used."""
    return _call("depthwise_kernel_gradient", [kernel.shape], x, cotangent, stride=stride)[0]


depthwise = depthwise_xla.with_gradients(
    depthwise_forward,
    depthwise_xla.separate(depthwise_input_gradient, depthwise_kernel_gradient),
    adds_bias=True,
)


def _call(
    name: str, shapes: Sequence[tuple[int, ...]], *args: jax.Array, **attributes: int
) -> Sequence[jax.Array]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(f"structvit_{name}", results, vmap_method="sequential")(*args, **attributes)
