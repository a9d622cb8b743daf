"""The kernels that replace definitions of `structvit_jax.ops`: one table of what runs where, and why.

For an operation on a platform the first kernel of the table that supports the arguments runs; without one,
the definition. The platform "portable" is for exported programs. On GPUs and TPUs a kernel is compared with
the definition before its first use, see `selfcheck`. Figures are from docs/speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.kernels import (
    attention_gpu,
    attention_tpu,
    convolution,
    depthwise,
    depthwise_bands,
    depthwise_sums,
    depthwise_tpu,
    feed_forward,
    feed_forward_tpu,
    layout,
    native,
    structsa,
)
from structvit_jax.ops.kernels.attention_blocks import attention_in_blocks
from structvit_jax.ops.kernels.selfcheck import trusted

__all__ = ["TABLE", "Kernel", "find", "named", "trusted"]


class Kernel(NamedTuple):
    """A row of the table."""

    name: str
    operation: str  # whose definition it replaces
    platform: str  # "cpu", "gpu", "tpu", or "portable"
    run: Callable[..., jax.Array]  # takes the arguments of the definition, all options by keyword
    executed: str  # where it has run
    why: str
    supports: Callable[..., bool] = lambda *arrays, **options: True  # takes the same arguments
    batched: int = 0  # arguments, the first, that devices split by examples; 0 if the compiler can split it


def find(operation: str, platform: str) -> Iterator[Kernel]:
    """Return the kernels of an operation on a platform, in order of preference."""
    return (kernel for kernel in TABLE if (kernel.operation, kernel.platform) == (operation, platform))


def named(name: str) -> Kernel:
    """Return the first kernel of this name."""
    return next(kernel for kernel in TABLE if kernel.name == name)


def _is_convolved(query: Any, key: Any, value: Any, key_kernels: Any, *_: Any, stride: int) -> bool:
    return key_kernels is not None


def _is_convolved_without_cudnn(query: Any, *others: Any, stride: int) -> bool:
    return _is_convolved(query, *others, stride=stride) and not attention_gpu.supports(query)


def _has_few_channels(x: jax.Array, kernel: jax.Array, **_: Any) -> bool:
    return x.shape[-1] <= convolution.FEW


def _is_video(x: jax.Array, *_: Any, **options: Any) -> bool:
    return x.ndim == 5


def _is_single(x: jax.Array, *_: Any, **options: Any) -> bool:
    return x.dtype != jnp.float64


def _is_image(x: jax.Array, *_: Any, **options: Any) -> bool:
    return x.ndim == 4


def _is_image_with_one_plane(x: jax.Array, kernel: jax.Array, *_: Any, stride: int) -> bool:
    return x.ndim == 4 and kernel.shape[-1] == 1


def _is_half_video_with_one_plane(x: jax.Array, kernel: jax.Array, *_: Any, stride: int) -> bool:
    return x.ndim == 5 and kernel.shape[-1] == 1 and x.dtype.itemsize == 2


def _fits_bands(x: jax.Array, kernel: jax.Array, *_: Any, stride: int) -> bool:
    long = math.prod(kernel.shape[:-2]) > depthwise_sums.MAX_FUSED_TERMS
    return _is_half_video_with_one_plane(x, kernel, stride=stride) and long


_pinned = depthwise.pinned
_sums_forward = depthwise.then_bias(_pinned(depthwise_sums.padded))
_sums_input_gradient = _pinned(depthwise_sums.padded_input_gradient)
_sums_kernel_gradient = _pinned(depthwise_sums.padded_kernel_gradient)
_bands_kernel_gradient = _pinned(depthwise_bands.banded_kernel_gradient)
_grouped = depthwise.then_bias(depthwise.grouped)


def _by_platform(
    cpu: Callable[..., jax.Array], default: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Choose a function of arrays and a stride when the program is lowered."""

    def run(*args: Any) -> jax.Array:
        *arrays, stride = args
        return lax.platform_dependent(
            *arrays,
            cpu=lambda *arrays: cpu(*arrays, stride),
            default=lambda *arrays: default(*arrays, stride),
        )

    return run


_IN_CACHE = 2**23  # bytes of attention's products that stay in the cache of a CPU
_AT_ONCE = 2**28  # bytes that fill other devices
# The kernels for GPUs ran on an H100 before they moved into this package, and not since.
_H100 = "run on an H100, before it moved here"
_TPU = "interpreted on a CPU and compiled for a v5e; not run on a TPU"
_CPU = "run on a CPU"

TABLE: tuple[Kernel, ...] = (
    # StructSA
    Kernel(
        "recompute_convolved", "struct_attention", "cpu", structsa.recompute_convolved, _CPU,
        "convolved keys and values are D times larger than their inputs", _is_convolved,
    ),
    Kernel(
        "recompute_convolved", "struct_attention", "gpu", structsa.recompute_convolved, "not run on a GPU",
        "as on CPUs; cuDNN's attention keeps keys and values for its own gradients",
        _is_convolved_without_cudnn,
    ),
    Kernel(
        "recompute_convolved", "struct_attention", "tpu", structsa.recompute_convolved, _TPU,
        "as on CPUs: 0.220 GB a step, 0.225 without (S-4-1, batch 32, compiled for a v5e)", _is_convolved,
    ),
    # attention
    Kernel(
        "attention_cpp", "attention", "cpu", native.attention, _CPU,
        "1568 queries, 6272 keys, 5 heads, forward and with gradients: 124 and 429 ms, in blocks 202 and 500",
        native.supports, batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "cpu", attention_in_blocks(_IN_CACHE), _CPU,
        "no C++ compiler, or half precision; 8 MB of products at a time stay in the cache", batched=3,
    ),
    Kernel(
        "attention_cudnn", "attention", "gpu", attention_gpu.attention, _H100,
        "8x1568 queries, 6272 keys, 5 heads: 0.24 and 0.90 ms, in blocks 2.65 and 6.79",
        attention_gpu.supports,
    ),
    Kernel(
        "attention_blocks", "attention", "gpu", attention_in_blocks(_AT_ONCE), _H100,
        "float32, wide heads, other GPUs; never a whole matrix of products in memory", batched=3,
    ),
    Kernel(
        "attention_pallas", "attention", "tpu", attention_tpu.attention, _TPU,
        "products stay in vector memory: 0.325 GB a step, 0.682 without (S-4-1, batch 32, compiled)",
        _is_single, batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "tpu", attention_in_blocks(_AT_ONCE), "not run on a TPU",
        "float64", batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "portable", attention_in_blocks(_AT_ONCE), _CPU,
        "in JAX alone; never a whole matrix of products in memory",
    ),
    # depthwise convolution
    Kernel(
        "depthwise_cpp", "depthwise_conv", "cpu", native.depthwise, _CPU,
        "8x56x56x64, 5x5, with gradients: 5.07 ms, PyTorch 20.6", native.supports, batched=1,
    ),
    Kernel(
        "depthwise_shifts", "depthwise_conv", "cpu",
        depthwise.with_gradients(
            depthwise.then_bias(depthwise_sums.shifted),
            depthwise_sums.shifted_input_gradient,
            depthwise_sums.shifted_kernel_gradient,
        ),
        _CPU, "no C++ compiler, or half precision; XLA's grouped convolution is up to 100 times slower",
    ),
    Kernel(
        "depthwise_library", "depthwise_conv", "gpu",
        depthwise.with_gradients(
            _grouped, depthwise.grouped_input_gradient, depthwise.library_kernel_gradient
        ),
        _H100, "128x56x56x64, 5x5: 0.098 ms by cuDNN, 0.44 as sums", _is_image_with_one_plane,
    ),
    Kernel(
        "depthwise_sums_library", "depthwise_conv", "gpu",
        depthwise.with_gradients(_sums_forward, depthwise.grouped_input_gradient, _sums_kernel_gradient),
        _H100, "128x14x14x320, 3x3, D = 4: forward 0.079 ms, 0.30 by cuDNN", _is_image, batched=1,
    ),
    Kernel(
        "depthwise_bands", "depthwise_conv", "gpu",
        depthwise.with_gradients(
            depthwise.then_bias(_pinned(depthwise_bands.banded)),
            _pinned(depthwise_bands.banded_input_gradient),
            _bands_kernel_gradient,
        ),
        _H100, "8x8x56x56x64, 5x5x5: 0.165 ms, 1.14 as sums, by tensor cores", _fits_bands, batched=1,
    ),
    Kernel(
        "depthwise_sums_bands", "depthwise_conv", "gpu",
        depthwise.with_gradients(_sums_forward, _sums_input_gradient, _bands_kernel_gradient),
        _H100, "8x8x14x14x320, 3x3x3: kernel gradient 0.084 ms, 0.162 as sums; forward 0.063 and 0.049",
        _is_half_video_with_one_plane, batched=1,
    ),
    Kernel(
        "depthwise_sums", "depthwise_conv", "gpu",
        depthwise.with_gradients(_sums_forward, _sums_input_gradient, _sums_kernel_gradient),
        _H100, "8x8x14x14x320, 3x3x3, D = 4: forward 0.094 ms, 0.26 by cuDNN", batched=1,
    ),
    Kernel(
        "depthwise_pallas", "depthwise_conv", "tpu", depthwise_tpu.depthwise, _TPU,
        "both gradients read their arrays once: 0.225 GB a step, 0.253 without (S-4-1, batch 32, compiled)",
        depthwise_tpu.supports, batched=1,
    ),
    Kernel(
        "depthwise_planes", "depthwise_conv", "tpu",
        depthwise.with_gradients(
            _grouped, depthwise.grouped_input_gradient, depthwise.grouped_kernel_gradient
        ),
        "compiled for a v5e; not run on a TPU",
        "with a stride, or large frames; XLA's gradients move a thousand times the bytes (video, D = 4)",
    ),
    Kernel(
        "depthwise_portable", "depthwise_conv", "portable",
        depthwise.with_gradients(
            depthwise.then_bias(_by_platform(depthwise_sums.shifted, depthwise.grouped)),
            _by_platform(depthwise_sums.shifted_input_gradient, depthwise.grouped_input_gradient),
            _by_platform(depthwise_sums.shifted_kernel_gradient, depthwise.grouped_kernel_gradient),
        ),
        _CPU, "shifts on CPUs, XLA's convolution elsewhere",
    ),
    # MLP
    *(
        Kernel(
            "mlp_recomputing_gelu", "mlp", platform, feed_forward.mlp_recomputing_gelu, executed,
            "keeps one hidden array for the backward pass where JAX keeps several",
        )
        for platform, executed in (("cpu", _CPU), ("gpu", _H100), ("portable", _CPU))
    ),
    Kernel(
        "mlp_pallas", "mlp", "tpu", feed_forward_tpu.mlp, _TPU,
        "hidden arrays stay in vector memory: 0.253 GB a step, 0.258 without (S-4-1, batch 32, compiled)",
        _is_single, batched=1,
    ),
    Kernel(
        "mlp_recomputing_gelu", "mlp", "tpu", feed_forward.mlp_recomputing_gelu, "not run on a TPU",
        "float64",
    ),
    # dense convolution
    *(
        Kernel(
            "convolve_multiply", "convolve", platform, convolution.multiply, executed, why, _is_video,
        )
        for platform, executed, why in (
            ("cpu", _CPU, "the embeddings of clips with gradients: 49 ms, 397 by XLA's convolution"),
            ("gpu", _H100, "XLA's convolution puts channels before time, and so does all that follows"),
            ("portable", _CPU, "as on CPUs"),
        )
    ),
    Kernel(
        "convolve_fold", "convolve", "cpu", convolution.fold, _CPU,
        "the gradients of XLA's convolution take eight times as long",
    ),
    *(
        Kernel(
            "convolve_fold", "convolve", platform, convolution.fold, executed,
            "three channels would take the memory of 128", _has_few_channels,
        )
        for platform, executed in (
            ("gpu", _H100), ("tpu", "compiled for a v5e; not run on a TPU"), ("portable", _CPU),
        )
    ),
    # layouts
    Kernel(
        "linear_of_rows", "linear", "cpu", layout.linear_of_rows, _CPU,
        "the gradient's transpose is a plain one: part of 1.06 in a train step",
    ),
    Kernel(
        "layer_norm_of_rows", "layer_norm", "gpu", layout.layer_norm_of_rows, _H100,
        "the compiler tries thousands of tiles for a grid, few for rows",
    ),
)  # fmt: skip
