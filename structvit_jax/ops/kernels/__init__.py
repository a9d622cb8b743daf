"""The kernels that replace definitions of `structvit_jax.ops`: one table of what runs where, and why.

For an operation on a platform the first kernel of the table that supports the arguments runs; without one,
the definition. The platform "portable" is for exported programs. On GPUs and TPUs a kernel is compared with
the definition before its first use, see `selfcheck`. Figures are from docs/speed.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.dispatch import Operation
from structvit_jax.ops.kernels import attention_tpu, attention_xla, depthwise_tpu, im2col, mlp_tpu, native
from structvit_jax.ops.kernels import depthwise_bands as bands
from structvit_jax.ops.kernels import depthwise_shifts as shifts
from structvit_jax.ops.kernels import depthwise_xla as xla
from structvit_jax.ops.kernels import row_layers as rows
from structvit_jax.ops.kernels.attention_xla import attention_in_blocks, cudnn_supports, recompute_convolved
from structvit_jax.ops.kernels.depthwise_xla import separate, with_gradients
from structvit_jax.ops.kernels.selfcheck import trusted
from structvit_jax.ops.kernels.target import current_device, on_own_examples


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


def choose(
    operation: Operation, arrays: Sequence[Any], options: dict[str, Any], *, portable: bool
) -> Callable[[], Any]:
    """Return the call of the first kernel of the table that fits, or of the definition."""
    device = current_device()
    for kernel in find(operation.__name__, "portable" if portable else device.platform):
        if kernel.supports(*arrays, **options):
            call = on_own_examples(kernel.run, arrays, options, kernel.batched)
            if call is not None and trusted(kernel, arrays[0].dtype, device):
                return call
    return functools.partial(operation.definition, *arrays, **options)


def find(operation: str, platform: str) -> Iterator[Kernel]:
    """Return the kernels of an operation on a platform, in order of preference."""
    return (kernel for kernel in TABLE if (kernel.operation, kernel.platform) == (operation, platform))


def named(name: str) -> Kernel:
    """Return the first kernel of this name."""
    return next(kernel for kernel in TABLE if kernel.name == name)


def _is_structural(query: Any, key: Any, value: Any, key_kernels: Any, *_: Any, stride: int) -> bool:
    return key_kernels is not None


def _is_half_video_with_one_plane(x: jax.Array, kernel: jax.Array, *_: Any, stride: int) -> bool:
    return x.ndim == 5 and kernel.shape[-1] == 1 and x.dtype.itemsize == 2


def _is_not_float64(x: jax.Array, *_: Any, **options: Any) -> bool:
    return x.dtype != jnp.float64


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
_CPU = "run on a CPU"
# The kernels for GPUs ran on an H100 before they moved into this package, and not since.
_H100 = "run on an H100, before it moved here"
_TPU = "interpreted on a CPU and compiled for a v5e; not run on a TPU"
_COMPILED = "compiled for a v5e; not run on a TPU"
_NOWHERE = "not run on this platform"

TABLE: tuple[Kernel, ...] = (
    # StructSA
    Kernel(
        "recompute_convolved", "struct_attention", "cpu", recompute_convolved, _CPU,
        "convolved keys and values are D times larger than their inputs", _is_structural,
    ),
    Kernel(
        "recompute_convolved", "struct_attention", "gpu", recompute_convolved, _NOWHERE,
        "as on CPUs; cuDNN's attention keeps keys and values for its own gradients",
        lambda query, key, value, kernels, *_, stride: kernels is not None and not cudnn_supports(query),
    ),
    Kernel(
        "recompute_convolved", "struct_attention", "tpu", recompute_convolved, _TPU,
        "as on CPUs: 0.220 GB a step, 0.225 without (S-4-1, batch 32, compiled for a v5e)", _is_structural,
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
        "attention_cudnn", "attention", "gpu", attention_xla.attention_by_cudnn, _H100,
        "8x1568 queries, 6272 keys, 5 heads: 0.24 and 0.90 ms, in blocks 2.65 and 6.79", cudnn_supports,
    ),
    Kernel(
        "attention_blocks", "attention", "gpu", attention_in_blocks(_AT_ONCE), _H100,
        "float32, wide heads, other GPUs; never a whole matrix of products in memory", batched=3,
    ),
    Kernel(
        "attention_pallas", "attention", "tpu", attention_tpu.attention, _TPU,
        "products stay in vector memory: 0.325 GB a step, 0.682 without (S-4-1, batch 32, compiled)",
        _is_not_float64, batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "tpu", attention_in_blocks(_AT_ONCE), _NOWHERE, "float64", batched=3
    ),
    Kernel(
        "attention_blocks", "attention", "portable", attention_in_blocks(_AT_ONCE), _CPU,
        "in JAX alone; never a whole matrix of products in memory",
    ),
    # depthwise convolution: a forward pass, and the gradients of input and kernel
    Kernel(
        "depthwise_cpp", "depthwise_conv", "cpu", native.depthwise, _CPU,
        "8x56x56x64, 5x5, with gradients: 5.07 ms, PyTorch 20.6", native.supports, batched=1,
    ),
    Kernel(
        "depthwise_shifts", "depthwise_conv", "cpu",
        with_gradients(
            shifts.shifted, separate(shifts.shifted_input_gradient, shifts.shifted_kernel_gradient)
        ),
        _CPU, "no C++ compiler, or half precision; XLA's grouped convolution is up to 100 times slower",
    ),
    Kernel(
        "depthwise_library", "depthwise_conv", "gpu",
        with_gradients(xla.grouped, separate(xla.grouped_input_gradient, xla.library_kernel_gradient)),
        _H100, "128x56x56x64, 5x5: 0.098 ms by cuDNN, 0.44 as sums",
        lambda x, kernel, *_, stride: x.ndim == 4 and kernel.shape[-1] == 1,
    ),
    Kernel(
        "depthwise_sums_library", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(xla.grouped_input_gradient, shifts.padded_kernel_gradient)),
        _H100, "128x14x14x320, 3x3, D = 4: forward 0.079 ms, 0.30 by cuDNN",
        lambda x, *_, stride: x.ndim == 4, batched=1,
    ),
    Kernel(
        "depthwise_bands", "depthwise_conv", "gpu",
        with_gradients(bands.banded, separate(bands.banded_input_gradient, bands.banded_kernel_gradient)),
        _H100, "8x8x56x56x64, 5x5x5: 0.165 ms, 1.14 as sums, by tensor cores",
        lambda x, kernel, *_, stride: _is_half_video_with_one_plane(x, kernel, stride=stride)
        and math.prod(kernel.shape[:-2]) > shifts.MAX_FUSED_TERMS,
        batched=1,
    ),
    Kernel(
        "depthwise_sums_bands", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(shifts.padded_input_gradient, bands.banded_kernel_gradient)),
        _H100, "8x8x14x14x320, 3x3x3: kernel gradient 0.084 ms, 0.162 as sums; forward 0.063 and 0.049",
        _is_half_video_with_one_plane, batched=1,
    ),
    Kernel(
        "depthwise_sums", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(shifts.padded_input_gradient, shifts.padded_kernel_gradient)),
        _H100, "8x8x14x14x320, 3x3x3, D = 4: forward 0.094 ms, 0.26 by cuDNN", batched=1,
    ),
    Kernel(
        "depthwise_pallas", "depthwise_conv", "tpu", depthwise_tpu.depthwise, _TPU,
        "both gradients read their arrays once: 0.225 GB a step, 0.253 without (S-4-1, batch 32, compiled)",
        depthwise_tpu.supports, batched=1,
    ),
    Kernel(
        "depthwise_planes", "depthwise_conv", "tpu",
        with_gradients(xla.grouped, separate(xla.grouped_input_gradient, xla.grouped_kernel_gradient)),
        _COMPILED,
        "with a stride, or large frames; XLA's gradients move a thousand times the bytes (video, D = 4)",
    ),
    Kernel(
        "depthwise_portable", "depthwise_conv", "portable",
        with_gradients(
            _by_platform(shifts.shifted, xla.grouped),
            separate(
                _by_platform(shifts.shifted_input_gradient, xla.grouped_input_gradient),
                _by_platform(shifts.shifted_kernel_gradient, xla.grouped_kernel_gradient),
            ),
        ),
        _CPU, "shifts on CPUs, XLA's convolution elsewhere",
    ),
    # MLP
    Kernel(
        "mlp_pallas", "mlp", "tpu", mlp_tpu.mlp, _TPU,
        "hidden arrays stay in vector memory: 0.253 GB a step, 0.258 without (S-4-1, batch 32, compiled)",
        _is_not_float64, batched=1,
    ),
    *(
        Kernel("mlp_recomputing_gelu", "mlp", platform, rows.mlp_recomputing_gelu, executed, why)
        for platform, executed, why in (
            ("cpu", _CPU, "keeps one hidden array for the backward pass where JAX keeps several"),
            ("gpu", _H100, "as on CPUs"),
            ("tpu", _NOWHERE, "float64"),
            ("portable", _CPU, "as on CPUs"),
        )
    ),
    # dense convolution
    *(
        Kernel(
            "convolve_multiply", "convolve", platform, im2col.multiply, executed, why,
            lambda x, *_, **options: x.ndim == 5,
        )
        for platform, executed, why in (
            ("cpu", _CPU, "the embeddings of clips with gradients: 49 ms, 397 by XLA's convolution"),
            ("gpu", _H100, "XLA's convolution puts channels before time, and so does all that follows"),
            ("portable", _CPU, "as on CPUs"),
        )
    ),
    Kernel(
        "convolve_fold", "convolve", "cpu", im2col.fold, _CPU,
        "the gradients of XLA's convolution take eight times as long",
    ),
    *(
        Kernel(
            "convolve_fold", "convolve", platform, im2col.fold, executed,
            "three channels would take the memory of 128",
            lambda x, *_, **options: x.shape[-1] <= 8,
        )
        for platform, executed in (("gpu", _H100), ("tpu", _COMPILED), ("portable", _CPU))
    ),
    # linear layer and layer normalisation
    Kernel(
        "linear_of_rows", "linear", "cpu", rows.linear_of_rows, _CPU,
        "the transpose of its gradient is a plain one: part of a factor of 1.06 in a train step",
    ),
    Kernel(
        "layer_norm_of_rows", "layer_norm", "gpu", rows.layer_norm_of_rows, _H100,
        "the compiler tries thousands of tiles for a grid, few for rows",
    ),
)  # fmt: skip
