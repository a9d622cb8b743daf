"""Medians of what runs in turns, and the rates that this machine reaches at all."""

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

_LEAST = 0.1  # seconds that one turn of a short call is repeated for


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time: `run` may return before it is done, `wait` on its result not."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready

    def seconds(self, repeats: int) -> float:
        """Of one run, over as many in a row, after one that does not count: the threads of the other library
        may still be spinning, its data lie in the caches, and its variants take their turns in a row."""
        self.wait(self.run())
        start = time.perf_counter()
        for _ in range(repeats):
            result = self.run()
        self.wait(result)
        return (time.perf_counter() - start) / repeats


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, over several turns."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def spread(self) -> str:
        """The fastest and the slowest turn, relative to the median."""
        return f"{min(self.turns) / self.median - 1:+.0%} {max(self.turns) / self.median - 1:+.0%}"

    def over(self, other: Times) -> float:
        """How many times as long as the other, which took its turns beside these: the median of ratios."""
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))


def alternate(calls: Mapping[str, Call], rounds: int) -> dict[str, Times]:
    """Times calls one after the other, again and again, so that what slows the machine slows all."""
    repeats = {}
    for name, call in calls.items():
        repeats[name] = max(1, math.ceil(_LEAST / call.seconds(1)))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            turns[name].append(call.seconds(repeats[name]))
    return {name: Times(tuple(seconds)) for name, seconds in turns.items()}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device reaches: the ceilings that all else is measured against."""

    operations: float  # a second, of matrix products
    bytes: float  # a second, read and written, of copies


def measure_rates(dtype: str, rounds: int) -> Rates:
    """Of the first device: the best of some sizes."""
    on_cpu = jax.default_backend() == "cpu"
    products = []
    for size in (1024, 2048) if on_cpu else (4096, 8192):
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        times = alternate({"": Call(functools.partial(product, a, a))}, rounds)[""]
        products.append(2 * size**3 / times.median)
    x = jnp.zeros(2**26 if on_cpu else 2**29, jnp.float32)
    moved, step = 2 * x.nbytes, jax.jit(lambda x: x + 1, donate_argnums=0)

    def again():  # in place: on CPUs fresh pages would cost more than what is written to them
        nonlocal x
        x = step(x)
        return x

    return Rates(max(products), moved / alternate({"": Call(again)}, rounds)[""].median)
