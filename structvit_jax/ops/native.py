"""Operations for CPUs in C++ (cpu/*.cc), float32, which the machine's own compiler builds when needed.

Where there is no compiler, `available` says so, and forms in JAX do the work. What is built is kept in the
user's cache folder, by the text, the compiler and the kind of processor that it is built for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

_FOLDER = Path(__file__).with_name("cpu")
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_OPERATIONS = (
    "attention_forward",
    "attention_backward",
    "depthwise_forward",
    "depthwise_of_input",
    "depthwise_of_kernel",
)


@functools.cache
def available() -> bool:
    """Whether they can be had here; the first call builds them, in some ten seconds."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError):
        return False
    for name in _OPERATIONS:
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"structvit_{name}", target, platform="cpu")
    return True


def takes(x: jax.Array) -> bool:
    """Whether operations on such arrays can be had here."""
    return x.dtype == jnp.float32 and available()


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int
) -> tuple[jax.Array, jax.Array]:
    """query [batch, N, heads·channels]; key, value [batch, M, heads·channels] -> output like query, and the
    logarithm of the sum of exponentials [batch, heads, N]."""
    batch, count, _ = query.shape
    shapes = query.shape, (batch, heads, count)
    output, lse = _call("attention_forward", shapes, query, key, value, heads=heads)
    return output, lse


def attention_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    *,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of query, key and value, from what `attention` returned and the cotangent of the output."""
    shapes = query.shape, key.shape, value.shape
    args = query, key, value, output, cotangent, lse
    d_query, d_key, d_value = _call("attention_backward", shapes, *args, heads=heads)
    return d_query, d_key, d_value


def depthwise(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, stride: int) -> jax.Array:
    """x [batch, *grid, channels], kernel [*window, channels, D], bias [channels, D]
    -> [batch, D, *grid', channels]."""
    batch, *frames, height, width, channels = x.shape
    made = batch, kernel.shape[-1], *frames, -(-height // stride), -(-width // stride), channels
    start = jnp.zeros(kernel.shape[-2:], jnp.float32) if bias is None else bias
    return _call("depthwise_forward", [made], x, kernel, start, stride=stride)[0]


def depthwise_input_gradient(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, stride: int
) -> jax.Array:
    """Like x, of which the shape is all that is needed."""
    return _call("depthwise_of_input", [x.shape], cotangent, kernel, stride=stride)[0]


def depthwise_kernel_gradient(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, stride: int
) -> jax.Array:
    """Like kernel, of which the shape is all that is needed."""
    return _call("depthwise_of_kernel", [kernel.shape], x, cotangent, stride=stride)[0]


def _call(name, shapes, *args, **attributes):
    made = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(f"structvit_{name}", made, vmap_method="sequential")(*args, **attributes)


def _built() -> Path:
    """The shared library, built if nobody has.

    Raises:
      OSError, subprocess.SubprocessError: no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    include = jax.ffi.include_dir()
    told = subprocess.run(
        [compiler, *_OPTIONS, "-E", "-dM", "-x", "c++", os.devnull], capture_output=True, check=True
    )
    units, shared = (sorted(_FOLDER.glob(pattern)) for pattern in ("*.cc", "*.h"))
    texts = [path.read_bytes() for path in (*units, *shared, Path(include, "xla/ffi/api/c_api.h"))]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structvit_jax"
    path = folder / f"native-{hashlib.sha256(b''.join([told.stdout, *texts])).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may be building it
            made = Path(scratch, path.name)
            command = [compiler, *_OPTIONS, "-I", include, *map(str, units), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True)
            os.replace(made, path)
    return path
