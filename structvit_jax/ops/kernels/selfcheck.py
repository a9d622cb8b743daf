"""Compare kernels with the definitions that they replace, on the device where they run.

On GPUs and TPUs this happens at small shapes before the first use of a kernel, in seconds. A kernel that does
not compile, fails or disagrees is replaced by the definition, with one line on stderr. The verdicts are kept
in the user's cache, for each kind of device and for the versions of JAX, of its compiler and of this
package.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from structvit_jax.ops.dispatch import DEFINITIONS, Device, use_kernels
from structvit_jax.runtime import cache

if TYPE_CHECKING:
    from structvit_jax.ops.kernels import Kernel

T = TypeVar("T")
Shape = tuple[int, ...]

CHECKED = {"gpu", "tpu"}  # platforms on which a kernel is compared before its first use
# Largest difference from the definition in float32, relative to the largest value of each array. GPUs and
# TPUs round the operands of float32 products by default.
_TOLERANCES = {"float64": 1e-10, "float32": 1e-2, "bfloat16": 4e-2, "float16": 1e-2}
_CPU_TOLERANCES = _TOLERANCES | {"float32": 1e-4}
_SECONDS = 0.2  # of repeated calls, for a time


class Example(NamedTuple):
    """Arguments of an operation."""

    shapes: tuple[Shape, ...]
    options: dict[str, Any]

    def abstract(self, dtype: str) -> list[jax.ShapeDtypeStruct]:
        """Return shapes and types of the arrays."""
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes]

    def arrays(self, dtype: str) -> list[jax.Array]:
        """Return random arrays; those after the first are scaled as weights are."""
        rng = np.random.default_rng(0)
        scales = [1.0, *(max(1, math.prod(shape[:-1])) ** -0.25 for shape in self.shapes[1:])]
        return [
            jnp.asarray(s * rng.standard_normal(n), dtype) for n, s in zip(self.shapes, scales, strict=True)
        ]


def _attention(batch: int, queries: int, keys: int, heads: int, channels: int) -> Example:
    lengths = queries, keys, keys
    return Example(tuple((batch, n, heads, channels) for n in lengths), {})


def _depthwise(x: Shape, window: Shape, planes: int, stride: int = 1) -> Example:
    return Example((x, (*window, x[-1], planes), (x[-1], planes)), {"stride": stride})


def _struct(x: Shape, window: Shape, planes: int) -> Example:
    kernels = (*window, *x[-2:], planes)
    return Example((x, x, x, kernels, kernels), {"stride": 1})


def _mlp(x: Shape) -> Example:
    width = x[-1]
    return Example((x, (width, 4 * width), (4 * width,), (4 * width, width), (width,)), {})


def _convolve(x: Shape, window: Shape, strides: Shape, padding: Shape, outputs: int) -> Example:
    return Example((x, (*window, x[-1], outputs)), {"strides": strides, "padding": padding})


def _layer_norm(x: Shape) -> Example:
    return Example((x, x[-1:], x[-1:]), {"epsilon": 1e-6})


def _linear(x: Shape, outputs: int) -> Example:
    return Example((x, (x[-1], outputs), (outputs,)), {})


SMALL = {
    "struct_attention": (_struct((2, 6, 7, 2, 16), (3, 3), 4),),
    "attention": (_attention(2, 49, 196, 2, 64), _attention(2, 13, 29, 3, 8)),
    "depthwise_conv": (
        _depthwise((2, 14, 13, 64), (5, 5), 1),
        _depthwise((2, 14, 13, 64), (3, 3), 4),
        _depthwise((2, 14, 13, 64), (3, 3), 4, stride=2),
        _depthwise((2, 4, 14, 13, 32), (3, 3, 3), 4),
        _depthwise((2, 4, 14, 13, 32), (3, 3, 3), 1),
        _depthwise((2, 6, 14, 40, 32), (5, 5, 5), 1),
    ),
    "mlp": (_mlp((2, 7, 9, 64)),),
    "convolve": (
        _convolve((2, 5, 17, 18, 3), (3, 4, 4), (2, 4, 4), (1, 0, 0), 16),
        _convolve((2, 16, 18, 3), (4, 4), (4, 4), (0, 0), 16),
        _convolve((2, 16, 18, 32), (2, 2), (2, 2), (0, 0), 16),
    ),
    "linear": (_linear((2, 7, 9, 32), 48),),
    "layer_norm": (_layer_norm((2, 7, 9, 32)),),
}


def _full(batch: int) -> dict[str, tuple[Example, ...]]:
    """Return examples of StructViT-S, images of 224 and clips of 16 frames."""
    return {
        "struct_attention": (_struct((batch, 14, 14, 5, 64), (3, 3), 4),),
        "attention": (_attention(batch, 196, 784, 5, 64), _attention(1, 1568, 6272, 5, 64)),
        "depthwise_conv": (
            _depthwise((batch, 56, 56, 64), (5, 5), 1),
            _depthwise((batch, 14, 14, 320), (3, 3), 4),
            _depthwise((batch, 14, 14, 320), (3, 3), 4, stride=2),
            _depthwise((1, batch, 14, 14, 320), (3, 3, 3), 4),
            _depthwise((1, batch, 14, 14, 320), (3, 3, 3), 1),
            _depthwise((1, batch, 28, 28, 64), (5, 5, 5), 1),
        ),
        "mlp": (_mlp((batch, 14, 14, 320)),),
        "convolve": (
            _convolve((1, 2 * batch, 224, 224, 3), (3, 4, 4), (2, 4, 4), (1, 0, 0), 64),
            _convolve((batch, 224, 224, 3), (4, 4), (4, 4), (0, 0), 64),
            _convolve((batch, 28, 28, 128), (2, 2), (2, 2), (0, 0), 320),
        ),
        "linear": (_linear((batch, 14, 14, 320), 960),),
        "layer_norm": (_layer_norm((batch, 14, 14, 320)),),
    }


FULL = {"cpu": _full(1), "gpu": _full(8), "tpu": _full(8)}  # definitions take minutes on CPUs


class Comparison(NamedTuple):
    """A kernel beside the definition."""

    kernel: Kernel
    dtype: str
    example: Example
    problem: str = ""  # why it does not replace the definition; "" if it does
    output_error: float = float("nan")  # relative to the largest value
    gradient_error: float = float("nan")  # the largest over the arguments
    seconds: float = float("nan")  # of the output and all gradients
    definition_seconds: float = float("nan")


def trusted(kernel: Kernel, dtype: Any, device: Device) -> bool:
    """Return whether a kernel may replace the definition on this kind of device.

    It is called while an outer function is traced: the comparison runs in a thread of its own, which has
    JAX's state as it is at the start. Programs for devices that are not in this process are not checked.
    """
    if kernel.platform not in CHECKED or not _is_present(device):
        return True
    verdicts, key = _verdicts(device.kind), f"{kernel.name} {np.dtype(dtype).name}"
    if key not in verdicts:
        verdicts[key] = _in_thread(lambda: _first_problem(kernel, np.dtype(dtype).name), device)
        _save(device.kind, verdicts)
    if verdicts[key]:
        _warn_once(key, device.kind, verdicts[key])
    return not verdicts[key]


def compare_all(device: Device) -> Iterator[Comparison]:
    """Compare all kernels of a platform at the shapes of StructViT-S, with times, and keep the verdicts.

    Args:
      device: a kind of device that this process has.
    """
    table = importlib.import_module("structvit_jax.ops.kernels").TABLE
    verdicts = _verdicts(device.kind)
    dtypes = ("float32",) if device.platform == "cpu" else ("bfloat16", "float32")
    for kernel in (kernel for kernel in table if kernel.platform == device.platform):
        for dtype in dtypes:
            problems = []
            for example in examples_of(kernel, FULL[device.platform][kernel.operation], dtype):
                task = functools.partial(compare, kernel, example, dtype, timed=True)
                yield (found := _in_thread(task, device))
                problems.append(found.problem)
            if problems:
                verdicts[f"{kernel.name} {dtype}"] = next(filter(None, problems), "")
    _save(device.kind, verdicts)


def examples_of(kernel: Kernel, examples: tuple[Example, ...], dtype: str) -> list[Example]:
    """Return the examples for which a kernel is the first choice, or else the first that it supports."""
    find = importlib.import_module("structvit_jax.ops.kernels").find

    def supports(other: Kernel, example: Example) -> bool:
        return other.supports(*example.abstract(dtype), **example.options)

    supported = [example for example in examples if supports(kernel, example)]
    candidates = list(find(kernel.operation, kernel.platform))
    chosen = [e for e in supported if next(other for other in candidates if supports(other, e)) is kernel]
    return chosen or supported[:1]


def compare(kernel: Kernel, example: Example, dtype: str, *, timed: bool = False) -> Comparison:
    """Compare the output and all gradients of a kernel with those of the definition in float32 at least."""
    definition, arrays = DEFINITIONS[kernel.operation], example.arrays(dtype)
    exact = [array.astype(jnp.promote_types(dtype, jnp.float32)) for array in arrays]
    cotangent = jax.eval_shape(functools.partial(definition, **example.options), *arrays)
    cotangent = Example((cotangent.shape,), {}).arrays(dtype)[0]
    tolerances = _CPU_TOLERANCES if kernel.platform == "cpu" else _TOLERANCES
    with use_kernels("reference"), jax.default_matmul_precision("highest"):
        run = _value_and_gradients(definition, example.options)
        expected = run(exact, cotangent.astype(exact[0].dtype))
    try:
        run = _value_and_gradients(kernel.run, example.options)
        found = run(arrays, cotangent)
        errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
    except Exception as error:  # whatever a compiler or a kernel raises
        reason = " ".join(str(error).split())[:200]
        return Comparison(kernel, dtype, example, f"{type(error).__name__}: {reason}")
    output, gradients = errors[0], max(errors[1:])
    problem = ""
    if not max(output, gradients) <= tolerances[dtype]:
        problem = (
            f"differs from the definition by {output:.1e} (gradients {gradients:.1e}) of the largest value"
        )
    result = Comparison(kernel, dtype, example, problem, output, gradients)
    if not timed:
        return result
    result = result._replace(seconds=_seconds(lambda: run(arrays, cotangent)))
    with use_kernels("reference"):
        run = _value_and_gradients(definition, example.options)
        return result._replace(definition_seconds=_seconds(lambda: run(arrays, cotangent)))


def _first_problem(kernel: Kernel, dtype: str) -> str:
    examples = examples_of(kernel, SMALL[kernel.operation], dtype)
    found = (compare(kernel, example, dtype).problem for example in examples)
    return next(filter(None, found), "")


def _value_and_gradients(
    function: Callable[..., jax.Array], options: dict[str, Any]
) -> Callable[[list[jax.Array], jax.Array], tuple[jax.Array, ...]]:
    def run(arrays: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        output, pull = jax.vjp(functools.partial(function, **options), *arrays)
        return output, *pull(cotangent)

    return jax.jit(run)


def _error(found: jax.Array, expected: jax.Array) -> float:
    a, b = (
        np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)), np.float64) for x in (found, expected)
    )
    difference = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def _seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call, after one that compiles it."""
    jax.block_until_ready(call())
    times: list[float] = []
    while not times or (sum(times) < _SECONDS and len(times) < 100):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _in_thread(task: Callable[[], T], device: Device) -> T:
    """Run a task on a device of this kind, in a thread without the contexts of the caller."""

    def run() -> T:
        with jax.default_device(jax.local_devices(backend=device.platform)[0]):
            return task()

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def _is_present(device: Device) -> bool:
    try:
        return jax.local_devices(backend=device.platform)[0].device_kind == device.kind
    except RuntimeError:
        return False


@functools.cache
def _warn_once(key: str, kind: str, problem: str) -> None:
    name, dtype = key.split()
    line = f"warning: the definition runs instead of the kernel {name} ({dtype}) on {kind}: {problem}"
    print(f"{line}. `structvit check` compares again", file=sys.stderr, flush=True)


@functools.cache
def _verdicts(kind: str) -> dict[str, str]:
    """Return what is known of kernels on a kind of device: problems by kernel and type, "" for none."""
    path = _path(kind)
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}


def _save(kind: str, verdicts: dict[str, str]) -> None:
    path = _path(kind)
    if path is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(verdicts, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass  # compared again by the next process


def _path(kind: str) -> Path | None:
    folder, _ = cache.user_folder("kernels")
    return folder and folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{_digest()}.json"


@functools.cache
def _digest() -> str:
    """Return a digest of the versions of JAX and its compiler, and of the sources of operations."""
    import jaxlib

    sources = sorted(
        path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".cc", ".h")
    )
    versions = jax.__version__, jaxlib.__version__, jax.devices()[0].client.platform_version
    content = b"".join([*map(str.encode, versions), *(path.read_bytes() for path in sources)])
    return hashlib.sha256(content).hexdigest()[:16]
