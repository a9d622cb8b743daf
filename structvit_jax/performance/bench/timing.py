"""Time calls in alternation, and measure the peak rates of this machine."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_MIN_SECONDS = 0.1  # short calls are repeated for at least this long in each round


@dataclasses.dataclass(frozen=True)
class Call:
    """A function to time. `run` may return before its work is done; `wait` blocks until it is."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready

    def seconds(self, repeats: int) -> float:
        """Return the mean seconds of consecutive runs, after a warm-up run.

        The warm-up fills the caches. It also gives idle threads of the other library, which spin for a while,
        time to go to sleep.
        """
        self.wait(self.run())
        start = time.perf_counter()
        for _ in range(repeats):
            result = self.run()
        self.wait(result)
        return (time.perf_counter() - start) / repeats


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> str:
        """Fastest and slowest round relative to the median, such as "-5% +15%"."""
        return f"{min(self.rounds) / self.median - 1:+.0%} {max(self.rounds) / self.median - 1:+.0%}"

    def ratio_to(self, other: Times) -> float:
        """Return the median over rounds of this time / the other time, measured in the same rounds."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def alternate(calls: Mapping[str, Call], rounds: int) -> dict[str, Times]:
    """Time calls alternately, so that a slow phase of the machine affects all of them."""
    repeats = {name: max(1, math.ceil(_MIN_SECONDS / call.seconds(1))) for name, call in calls.items()}
    by_round = [{name: call.seconds(repeats[name]) for name, call in calls.items()} for _ in range(rounds)]
    return {name: Times(tuple(seconds[name] for seconds in by_round)) for name in calls}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured peak rates of one device."""

    operations: float  # per second, in matrix products
    bytes: float  # read and written per second, in an elementwise in-place update


def measure_rates(dtype: str, rounds: int) -> Rates:
    """Measure the peak rates of the first device.

    The rate of operations is that of the faster of two square matrix products. The rate of bytes is that of
    adding 1 to a large array in place.
    """
    on_cpu = jax.default_backend() == "cpu"
    operations = []
    for size in (1024, 2048) if on_cpu else (4096, 8192):
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        matmul = jax.jit(jnp.matmul).lower(a, a).compile()
        operations.append(2 * size**3 / _median_seconds(functools.partial(matmul, a, a), rounds))
    x = jnp.zeros(2**26 if on_cpu else 2**29, jnp.float32)
    moved, increment = 2 * x.nbytes, jax.jit(lambda x: x + 1, donate_argnums=0)

    def update() -> jax.Array:  # in place, because on CPUs new memory pages cost more than the writes
        nonlocal x
        x = increment(x)
        return x

    return Rates(max(operations), moved / _median_seconds(update, rounds))


def _median_seconds(run: Callable[[], jax.Array], rounds: int) -> float:
    return alternate({"": Call(run)}, rounds)[""].median
