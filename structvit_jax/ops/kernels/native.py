"""C++ kernels for CPUs (cpu/*.cc): attention and depthwise convolution in float32.

The C++ compiler of the machine builds them on first use. If this fails, `available` returns False and kernels
in JAX run instead. The library is kept in a private folder of the user's cache. Its file name contains a
digest of what it was built from (sources, compiler, processor), and a digest of the file itself, which is
checked before the library is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from structvit_jax.ops.kernels import attention_xla, depthwise_xla
from structvit_jax.runtime import cache

_FOLDER = Path(__file__).with_name("cpu")
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
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
    try:
        library = _load()
    except (OSError, subprocess.SubprocessError):
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


def _load() -> ctypes.CDLL:
    """Load the shared library; build it unless the cache has an unchanged one.

    Raises:
      OSError, subprocess.SubprocessError: there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    folder, problem = cache.user_folder("native")
    if folder:
        return ctypes.CDLL(str(_cached(folder, compiler)))
    print(f"note: {problem}; C++ kernels are built again for this process only", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:  # a loaded library outlives its file
        return ctypes.CDLL(str(_build(compiler, Path(scratch))))


def _cached(folder: Path, compiler: str) -> Path:
    """Return the path of the cached library; build it if needed, and remove files with a wrong digest."""
    key = _digest(_ingredients(compiler))[:16]
    for path in folder.glob(f"native-{key}-*.so"):
        if path.is_file() and path.name == _name(key, path):
            return path
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _build(compiler, Path(scratch))
        path = folder / _name(key, built)
        os.replace(built, path)  # atomic: another process may do the same
    return path


def _name(key: str, path: Path) -> str:
    return f"native-{key}-{_digest(path.read_bytes())}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _ingredients(compiler: str) -> bytes:
    """Return what the library depends on: the compiler's macros for this processor, sources and headers."""
    macros = subprocess.run(
        [compiler, *_OPTIONS, "-E", "-dM", "-x", "c++", os.devnull], capture_output=True, check=True
    )
    sources = [path for pattern in ("*.cc", "*.h") for path in sorted(_FOLDER.glob(pattern))]
    texts = [path.read_bytes() for path in (*sources, Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h"))]
    return b"".join([macros.stdout, *texts])


def _build(compiler: str, folder: Path) -> Path:
    """Compile the library into a folder; only this user can read the file."""
    built, units = folder / "native.so", map(str, sorted(_FOLDER.glob("*.cc")))
    command = [compiler, *_OPTIONS, "-I", jax.ffi.include_dir(), *units, "-o", str(built)]
    subprocess.run(command, capture_output=True, check=True)
    built.chmod(0o700)
    return built
