"""Kernels that replace the definitions in `structvit_jax.ops`: a table of which kernel runs where, and why.

An operation runs the first kernel in the table for its platform that supports the arguments. If there is
none, it runs the definition. The platform "portable" is for exported programs. On GPUs and TPUs a kernel is
compared with the definition before its first use (see `selfcheck`). The numbers in the table are from
docs/speed.md and docs/speed-history.md.
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
    operation: str  # the operation whose definition it replaces
    platform: str  # "cpu", "gpu", "tpu", or "portable"
    run: Callable[..., jax.Array]  # takes the arguments of the definition, with all options by keyword
    executed: str  # where this kernel has been executed or compiled
    why: str  # why it replaces the definition, or is used besides other kernels
    supports: Callable[..., bool] = lambda *arrays, **options: True  # takes the arguments of `run`
    # Number of leading arguments with a batch axis, which is split over devices; 0 if the compiler can split
    # the kernel itself.
    batched: int = 0


def choose(
    operation: Operation, arrays: Sequence[Any], options: dict[str, Any], *, portable: bool
) -> Callable[[], Any]:
    """Return a call of the first kernel in the table that supports the arguments, or of the definition."""
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
    """Return the first kernel with this name, on any platform."""
    return next(kernel for kernel in TABLE if kernel.name == name)


def _is_structural(query: Any, key: Any, value: Any, key_kernels: Any, *_: Any, stride: int) -> bool:
    return key_kernels is not None


def _is_half_video_with_one_kernel(x: jax.Array, kernel: jax.Array, *_: Any, stride: int) -> bool:
    return x.ndim == 5 and kernel.shape[-1] == 1 and x.dtype.itemsize == 2


def _is_not_float64(x: jax.Array, *_: Any, **options: Any) -> bool:
    return x.dtype != jnp.float64


def _by_platform(
    cpu: Callable[..., jax.Array], default: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Return a function of arrays and a stride that chooses its implementation when a program is lowered."""

    def run(*args: Any) -> jax.Array:
        *arrays, stride = args
        return lax.platform_dependent(
            *arrays,
            cpu=lambda *arrays: cpu(*arrays, stride),
            default=lambda *arrays: default(*arrays, stride),
        )

    return run


# Bytes of attention logits that are computed at a time.
_CPU_LOGITS = 2**23  # few enough to stay in the cache
_LOGITS = 2**28  # enough to keep a GPU or TPU busy
_CPU = "run on a CPU"
# The kernels for GPUs ran on an H100 before they moved into this package. They have not run on a GPU since.
_H100 = "run on an H100, before it moved into this package"
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
        "as on CPUs, but not with cuDNN, whose attention stores convolved keys and values for its gradients",
        lambda query, key, value, kernels, *_, stride: kernels is not None and not cudnn_supports(query),
    ),
    Kernel(
        "recompute_convolved", "struct_attention", "tpu", recompute_convolved, _TPU,
        "as on CPUs; 0.220 GB per sample, 0.225 without it (S-4-1, batch 32, compiled for a v5e)",
        _is_structural,
    ),
    # attention
    Kernel(
        "attention_cpp", "attention", "cpu", native.attention, _CPU,
        "1568 queries, 6272 keys, 5 heads: forward 124 ms, with gradients 429 (attention_blocks: 202, 500)",
        native.supports, batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "cpu", attention_in_blocks(_CPU_LOGITS), _CPU,
        "no C++ compiler, or half precision; 8 MB of logits at a time stay in the cache",
        batched=3,
    ),
    Kernel(
        "attention_cudnn", "attention", "gpu", attention_xla.attention_by_cudnn, _H100,
        "8x1568 queries, 6272 keys, 5 heads: 0.24 ms, with gradients 0.90 (attention_blocks: 2.65, 6.79)",
        cudnn_supports,
    ),
    Kernel(
        "attention_blocks", "attention", "gpu", attention_in_blocks(_LOGITS), _H100,
        "for float32, wide heads and other GPUs; the whole attention matrix is never in memory", batched=3,
    ),
    Kernel(
        "attention_pallas", "attention", "tpu", attention_tpu.attention, _TPU,
        "logits stay in vector memory: 0.325 GB per sample, 0.682 without it (S-4-1, batch 32, compiled)",
        _is_not_float64, batched=3,
    ),
    Kernel(
        "attention_blocks", "attention", "tpu", attention_in_blocks(_LOGITS), _NOWHERE, "float64", batched=3
    ),
    Kernel(
        "attention_blocks", "attention", "portable", attention_in_blocks(_LOGITS), _CPU,
        "compiles for every platform; the whole attention matrix is never in memory",
    ),
    # depthwise convolution: `with_gradients` takes a forward pass and the gradients of input and kernel
    Kernel(
        "depthwise_cpp", "depthwise_conv", "cpu", native.depthwise, _CPU,
        "8x56x56x64, 5x5, with gradients: 5.07 ms (PyTorch: 20.6)", native.supports, batched=1,
    ),
    Kernel(
        "depthwise_shifts", "depthwise_conv", "cpu",
        with_gradients(
            shifts.shifted, separate(shifts.shifted_input_gradient, shifts.shifted_kernel_gradient)
        ),
        _CPU,
        "no C++ compiler, or half precision; XLA's grouped convolution is up to 100 times slower",
    ),
    Kernel(
        "depthwise_library", "depthwise_conv", "gpu",
        with_gradients(xla.grouped, separate(xla.grouped_input_gradient, xla.library_kernel_gradient)),
        _H100, "128x56x56x64, 5x5: forward 0.098 ms by cuDNN (a sum of shifted products: 0.44)",
        lambda x, kernel, *_, stride: x.ndim == 4 and kernel.shape[-1] == 1,
    ),
    Kernel(
        "depthwise_sums_library", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(xla.grouped_input_gradient, shifts.padded_kernel_gradient)),
        _H100, "128x14x14x320, 3x3, D = 4: forward 0.079 ms (cuDNN: 0.30)",
        lambda x, *_, stride: x.ndim == 4, batched=1,
    ),
    Kernel(
        "depthwise_bands", "depthwise_conv", "gpu",
        with_gradients(bands.banded, separate(bands.banded_input_gradient, bands.banded_kernel_gradient)),
        _H100, "tensor cores; 8x8x56x56x64, 5x5x5: forward 0.165 ms (a sum of shifted products: 1.14)",
        lambda x, kernel, *_, stride: _is_half_video_with_one_kernel(x, kernel, stride=stride)
        and math.prod(kernel.shape[:-2]) > shifts.MAX_FUSED_TERMS,
        batched=1,
    ),
    Kernel(
        "depthwise_sums_bands", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(shifts.padded_input_gradient, bands.banded_kernel_gradient)),
        _H100,
        "8x8x14x14x320, 3x3x3, ms: bands are faster for the kernel gradient (0.084; loop over taps 0.162),"
        " but not forward (0.063; 0.049)",
        _is_half_video_with_one_kernel, batched=1,
    ),
    Kernel(
        "depthwise_sums", "depthwise_conv", "gpu",
        with_gradients(shifts.padded, separate(shifts.padded_input_gradient, shifts.padded_kernel_gradient)),
        _H100, "8x8x14x14x320, 3x3x3, D = 4: forward 0.094 ms (cuDNN: 0.26)", batched=1,
    ),
    Kernel(
        "depthwise_pallas", "depthwise_conv", "tpu", depthwise_tpu.depthwise, _TPU,
        "both gradients read arrays once: 0.225 GB per sample, 0.253 without it (S-4-1, batch 32, compiled)",
        depthwise_tpu.supports, batched=1,
    ),
    Kernel(
        "depthwise_grouped", "depthwise_conv", "tpu",
        with_gradients(xla.grouped, separate(xla.grouped_input_gradient, xla.grouped_kernel_gradient)),
        _COMPILED,
        "for a stride or large frames; XLA's own gradients move a thousand times the bytes (video, D = 4)",
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
        _CPU, "a sum of shifted products on CPUs, XLA's grouped convolution elsewhere",
    ),
    # MLP
    Kernel(
        "mlp_pallas", "mlp", "tpu", mlp_tpu.mlp, _TPU,
        "no hidden arrays in HBM: 0.253 GB per sample, 0.258 without it (S-4-1, batch 32, compiled)",
        _is_not_float64, batched=1,
    ),
    *(
        Kernel("mlp_recomputing_gelu", "mlp", platform, rows.mlp_recomputing_gelu, executed, why)
        for platform, executed, why in (
            ("cpu", _CPU, "stores one hidden array for the backward pass; JAX stores several"),
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
            ("cpu", _CPU, "the four embeddings of clips, with gradients: 49 ms (XLA's convolution: 397)"),
            ("gpu", _H100, "XLA's convolution lays out channels before time, and so do the layers after it"),
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
            "otherwise three input channels would be padded to 128",
            lambda x, *_, **options: x.shape[-1] <= 8,
        )
        for platform, executed in (("gpu", _H100), ("tpu", _COMPILED), ("portable", _CPU))
    ),
    # linear layer and layer normalisation
    Kernel(
        "linear_of_rows", "linear", "cpu", rows.linear_of_rows, _CPU,
        "its gradient needs only a matrix transpose; with another change, train steps are 1.06 times as fast",
    ),
    Kernel(
        "layer_norm_of_rows", "layer_norm", "gpu", rows.layer_norm_of_rows, _H100,
        "the compiler tries thousands of tile sizes for an array with a grid, but few for one with rows",
    ),
)  # fmt: skip
