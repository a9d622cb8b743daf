"""Operations that run either their definition in plain JAX or a kernel of `structvit_jax.ops.kernels`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from structvit_jax.utils.errors import check_choice

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: dict[str, Operation] = {}  # all operations, by name
_CHOICES = ("auto", "reference", "portable")
_chosen = jax.make_user_context("auto")  # part of jit's cache key, so that a change retraces functions


@contextlib.contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Choose the implementation of all operations that are traced inside this context.

    Args:
      kernels: "auto" uses the preferred kernel for the platform, dtypes and shapes. "reference" uses the
        definitions in plain JAX. "portable", for exported programs, uses kernels written in JAX that compile
        for every platform.

    Raises:
      UserError: `kernels` has another value.
    """
    with _chosen(check_choice("kernels", kernels, _CHOICES)):
        yield


class Operation(Generic[P, R]):
    """A function on arrays whose definition can be replaced by a kernel.

    Positional arguments are arrays or None; the first one is an array with a leading batch axis. Options are
    passed by keyword.
    """

    __name__: str

    def __init__(self, definition: Callable[P, R], check: Callable[..., None] | None):
        functools.update_wrapper(self, definition)
        OPERATIONS[self.__name__] = self
        self.definition = definition
        self._check = check
        self._signature = inspect.signature(definition)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        arrays = [array if array is None else jnp.asarray(array) for array in bound.args]
        if self._check:
            self._check(*arrays, **bound.kwargs)
        definition: Callable[..., R] = self.definition
        if _chosen.value == "reference":
            return definition(*arrays, **bound.kwargs)
        kernels = importlib.import_module("structvit_jax.ops.kernels")  # avoids a circular import
        call = kernels.choose(self, arrays, bound.kwargs, portable=_chosen.value == "portable")
        return call()


def operation(check: Callable[..., None] | None = None) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorate the definition of an operation.

    Args:
      check: called with the arguments of the operation; raises ValueError, in one line, if they are invalid.
    """
    return lambda definition: Operation(definition, check)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
