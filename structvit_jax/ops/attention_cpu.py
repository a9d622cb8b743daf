"""Attention on CPUs in C++, attention_cpu.cc, which the machine's own compiler builds when it is needed.

Where there is no compiler, `available` says so, and the loops of `attention.py` do the work. What is built is
kept in the user's cache folder, by the text, the compiler and the kind of processor that it is built for.
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

_SOURCE = Path(__file__).with_suffix(".cc")
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_FORWARD, _BACKWARD = "structvit_attention_forward", "structvit_attention_backward"


@functools.cache
def available() -> bool:
    """Whether it can be had here; the first call builds it, in a few seconds."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError):
        return False
    for name, function in ((_FORWARD, library.attention_forward), (_BACKWARD, library.attention_backward)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return True


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int) -> tuple[jax.Array, jax.Array]:
    """query [batch, N, heads·channels]; key, value [batch, M, heads·channels], float32 -> output like query,
    and the logarithm of the sum of exponentials [batch, heads, N]."""
    batch, count, _ = query.shape
    results = _like(query), jax.ShapeDtypeStruct((batch, heads, count), jnp.float32)
    output, lse = jax.ffi.ffi_call(_FORWARD, results, vmap_method="sequential")(
        query, key, value, heads=heads
    )
    return output, lse


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    *,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `forward`'s output: of query, key and value."""
    results = _like(query), _like(key), _like(value)
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="sequential")
    d_query, d_key, d_value = call(query, key, value, output, cotangent, lse, heads=heads)
    return d_query, d_key, d_value


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


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
    parts = (_SOURCE.read_bytes(), told.stdout, Path(include, "xla/ffi/api/c_api.h").read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structvit_jax"
    path = folder / f"attention_cpu-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may be building it
            made = Path(scratch, path.name)
            command = [compiler, *_OPTIONS, "-I", include, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True)
            os.replace(made, path)
    return path
