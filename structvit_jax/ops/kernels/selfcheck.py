"""Compare kernels with the definitions that they replace, on the device where they run.

On GPUs and TPUs a kernel is compared at small shapes before its first use, which takes seconds. If it does
not compile, fails, or disagrees with the definition, the definition runs instead, with a warning of one line
on stderr. The verdict is kept in the user's cache. It is valid for one kind of device, one version of JAX and
of its compiler, and one version of the source files of `structvit_jax.ops`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import math
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from structvit_jax.ops.dispatch import OPERATIONS, use_kernels
from structvit_jax.ops.kernels.target import Device
from structvit_jax.utils import user_cache

if TYPE_CHECKING:
    from structvit_jax.ops.kernels import Kernel

Shape = tuple[int, ...]

CHECKED = {"gpu", "tpu"}  # platforms on which kernels are compared before their first use
# Largest allowed difference from the definition in float32 (or float64), relative to the largest value of
# each array. The one of float32 is large because GPUs and TPUs round the operands of products by default.
_TOLERANCES = {"float64": 1e-10, "float32": 1e-2, "bfloat16": 4e-2, "float16": 1e-2}
_CPU_TOLERANCES = _TOLERANCES | {"float32": 1e-4}


class Example(NamedTuple):
    """Arguments with which kernels and definitions are compared."""

    shapes: tuple[Shape, ...]
    options: dict[str, Any]

    def abstract(self, dtype: str) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes and types of the arrays."""
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes]

    def arrays(self, dtype: str) -> list[jax.Array]:
        """Return random arrays. All but the first are scaled down, like weights."""
        rng = np.random.default_rng(0)
        scales = [1.0, *(max(1, math.prod(shape[:-1])) ** -0.25 for shape in self.shapes[1:])]
        draws = [s * rng.standard_normal(shape) for s, shape in zip(scales, self.shapes, strict=True)]
        return [jnp.asarray(draw, dtype) for draw in draws]


def _examples(
    batch: int,  # images in a batch; clips come one at a time, with twice as many frames
    grid: Shape,  # height and width of an attention block
    width: int,  # channels of an attention block
    heads: int,
    lengths: Shape,  # numbers of queries and keys in the second example of attention
    pixels: Shape,  # height and width of the input
    early: Shape,  # height, width and channels of a convolution block
) -> dict[str, list[Example]]:
    """Return examples of arguments for every operation."""
    x, clip, image = (batch, *grid, width), (1, 2 * batch, *grid, width), (batch, *pixels, 3)
    row, positions = (heads, width // heads), math.prod(grid)
    operand, kernels = (batch, *grid, *row), (3, 3, *row, 4)

    def attention(batch: int, queries: int, keys: int) -> Example:
        return Example(tuple((batch, n, *row) for n in (queries, keys, keys)), {})

    def depthwise(x: Shape, window: Shape, multiplier: int, stride: int = 1) -> Example:
        return Example((x, (*window, x[-1], multiplier), (x[-1], multiplier)), {"stride": stride})

    def convolve(x: Shape, window: Shape, strides: Shape, padding: Shape) -> Example:
        return Example((x, (*window, x[-1], 64)), {"strides": strides, "padding": padding})

    return {
        "struct_attention": [Example((operand, operand, operand, kernels, kernels), {"stride": 1})],
        "attention": [attention(batch, positions, 4 * positions), attention(1, *lengths)],
        "depthwise_conv": [
            depthwise((batch, *early), (5, 5), 1),
            depthwise(x, (3, 3), 4),
            depthwise(x, (3, 3), 4, stride=2),
            depthwise(clip, (3, 3, 3), 4),
            depthwise(clip, (3, 3, 3), 1),
            depthwise((1, 2 * batch, *early), (5, 5, 5), 1),
        ],
        "mlp": [Example((x, (width, 4 * width), (4 * width,), (4 * width, width), (width,)), {})],
        "convolve": [
            convolve((1, 2 * batch, *pixels, 3), (3, 4, 4), (2, 4, 4), (1, 0, 0)),
            convolve(image, (4, 4), (4, 4), (0, 0)),
            convolve(x, (2, 2), (2, 2), (0, 0)),
        ],
        "linear": [Example((x, (width, 3 * width), (3 * width,)), {})],
        "layer_norm": [Example((x, (width,), (width,)), {"epsilon": 1e-6})],
    }


SMALL = _examples(3, (7, 6), 32, heads=2, lengths=(13, 29), pixels=(17, 18), early=(14, 40, 32))
FULL = {  # shapes of StructViT-S, with batch 1 on CPUs, where the definitions take minutes
    platform: _examples(batch, (14, 14), 320, 5, lengths=(1568, 6272), pixels=(224, 224), early=(28, 28, 128))
    for platform, batch in (("cpu", 1), ("gpu", 8), ("tpu", 8))
}


def examples_of(kernel: Kernel, examples: Sequence[Example], dtype: str) -> list[Example]:
    """Return the examples for which a kernel is the first choice, or else one that it supports, if any."""
    find = importlib.import_module("structvit_jax.ops.kernels").find

    def supports(other: Kernel, example: Example) -> bool:
        return other.supports(*example.abstract(dtype), **example.options)

    supported = [example for example in examples if supports(kernel, example)]
    candidates = list(find(kernel.operation, kernel.platform))
    chosen = [e for e in supported if next(other for other in candidates if supports(other, e)) is kernel]
    return chosen or supported[:1]


class Comparison(NamedTuple):
    """The result of comparing a kernel with its definition, for one example."""

    kernel: Kernel
    dtype: str
    example: Example
    problem: str = ""  # why the kernel may not replace the definition; "" if it may
    output_error: float = math.nan  # largest difference, relative to the largest value
    gradient_error: float = math.nan  # the same for gradients; the largest over all arguments
    seconds: float = math.nan  # time to compute the output and all gradients
    definition_seconds: float = math.nan


def trusted(kernel: Kernel, dtype: Any, device: Device) -> bool:
    """Return whether a kernel may replace the definition on this kind of device.

    Kernels in programs that are compiled for a device that is not attached are trusted without a check.
    """
    return kernel.platform not in CHECKED or not _problem(kernel, np.dtype(dtype).name, device)


@functools.cache
def _problem(kernel: Kernel, dtype: str, device: Device) -> str:
    """Return why a kernel may not replace the definition, from the cache or a comparison; "" if it may."""
    try:
        if jax.local_devices(backend=device.platform)[0].device_kind != device.kind:
            return ""
    except RuntimeError:  # no such device
        return ""
    verdict, path = "", _verdict_path(kernel, dtype, device)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        verdict = path.read_text() if path else ""
    if not verdict:
        examples = examples_of(kernel, SMALL[kernel.operation], dtype)
        verdict = _keep_verdict(device, [_in_thread(device, kernel, e, dtype) for e in examples])
    if verdict == "ok":
        return ""
    line = f"warning: the definition runs instead of the kernel {kernel.name} ({dtype}) on {device.kind}"
    print(f"{line}: {verdict}. `structvit check` repeats the comparison", file=sys.stderr, flush=True)
    return verdict


def compare_all(device: Device) -> Iterator[Comparison]:
    """Compare and time all kernels of a platform at the shapes of StructViT-S; cache the verdicts.

    Args:
      device: a kind of device that is attached.
    """
    table = importlib.import_module("structvit_jax.ops.kernels").TABLE
    dtypes = ("float32",) if device.platform == "cpu" else ("bfloat16", "float32")
    for kernel in (kernel for kernel in table if kernel.platform == device.platform):
        for dtype in dtypes:
            found = []
            for example in examples_of(kernel, FULL[device.platform][kernel.operation], dtype):
                found.append(_in_thread(device, kernel, example, dtype, timed=True))
                yield found[-1]
            _keep_verdict(device, found)


def _in_thread(device: Device, *args: Any, **options: Any) -> Comparison:
    """Call `compare` in a new thread, because this thread may be tracing a function that calls the kernel."""

    def run() -> Comparison:
        with jax.default_device(jax.local_devices(backend=device.platform)[0]):
            return compare(*args, **options)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def compare(kernel: Kernel, example: Example, dtype: str, *, timed: bool = False) -> Comparison:
    """Compare the output and all gradients of a kernel with those of the definition in at least float32."""
    definition, arrays = OPERATIONS[kernel.operation].definition, example.arrays(dtype)
    output = jax.eval_shape(functools.partial(definition, **example.options), *arrays)
    arguments = *arrays, *Example((output.shape,), {}).arrays(dtype)
    exact = [array.astype(jnp.promote_types(dtype, jnp.float32)) for array in arguments]
    with use_kernels("reference"), jax.default_matmul_precision("highest"):
        expected = _value_and_gradients(definition, example)(*exact)
    run = _value_and_gradients(kernel.run, example)
    try:
        errors = [_error(a, b) for a, b in zip(run(*arguments), expected, strict=True)]
    except Exception as error:  # compilers and kernels raise many types
        reason = " ".join(str(error).split())[:200]
        return Comparison(kernel, dtype, example, f"{type(error).__name__}: {reason}")
    tolerance = (_CPU_TOLERANCES if kernel.platform == "cpu" else _TOLERANCES)[dtype]
    sizes = f"{errors[0]:.1e} (gradients {max(errors[1:]):.1e}) of the largest value"
    problem = f"differs from the definition by {sizes}" if max(errors) > tolerance else ""
    found = Comparison(kernel, dtype, example, problem, errors[0], max(errors[1:]))
    if not timed:
        return found
    with use_kernels("reference"):
        definition_seconds = _seconds(_value_and_gradients(definition, example), arguments)
    return found._replace(seconds=_seconds(run, arguments), definition_seconds=definition_seconds)


def _value_and_gradients(function: Callable[..., jax.Array], example: Example) -> Callable[..., Any]:
    """Return a jitted function: (*arguments, cotangent) -> (output, *gradients)."""

    def run(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        *arrays, cotangent = arguments
        output, pull = jax.vjp(functools.partial(function, **example.options), *arrays)
        return output, *pull(cotangent)

    return jax.jit(run)


def _error(found: jax.Array, expected: jax.Array) -> float:
    """Return the largest difference relative to the largest expected value; infinity if one is not finite."""
    a, b = (np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)), float) for x in (found, expected))
    difference = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else math.inf


def _seconds(function: Callable[..., Any], arguments: Sequence[jax.Array]) -> float:
    """Return the mean seconds of a call, after a first call that compiles."""
    jax.block_until_ready(function(*arguments))
    calls, seconds = timeit.Timer(lambda: jax.block_until_ready(function(*arguments))).autorange()
    return seconds / calls


def _keep_verdict(device: Device, found: Sequence[Comparison]) -> str:
    """Return the first problem in the comparisons of a kernel, or "ok"; store it in the user's cache."""
    verdict = next((comparison.problem for comparison in found if comparison.problem), "ok")
    if found and (path := _verdict_path(found[0].kernel, found[0].dtype, device)):
        with contextlib.suppress(OSError):  # without the file, the next process compares again
            path.write_text(verdict)
    return verdict


def _verdict_path(kernel: Kernel, dtype: str, device: Device) -> Path | None:
    folder, _ = user_cache.user_folder("kernels")
    key = hashlib.sha256(f"{kernel.name} {dtype} {device.kind} {_versions()}".encode()).hexdigest()
    return folder and folder / f"{kernel.name}-{dtype}-{key[:16]}"


@functools.cache
def _versions() -> str:
    """Return the versions of JAX and its compiler, and a digest of all sources of `structvit_jax.ops`."""
    sources = sorted(p for p in Path(__file__).parents[1].rglob("*") if p.suffix in (".py", ".cc", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{jax.__version__} {jaxlib.__version__} {jax.devices()[0].client.platform_version} {digest}"
