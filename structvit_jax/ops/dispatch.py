"""Run an operation: by its definition in plain JAX, or by a kernel of `structvit_jax.ops.kernels`."""

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
_chosen = jax.make_user_context("auto")  # part of the key of jax.jit: a change traces functions again


@contextlib.contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Set what runs for the operations that are traced inside the block.

    Args:
      kernels: "auto" takes the fastest kernel for the platform, types and shapes; "reference" takes the
        definitions, in plain JAX, everywhere; "portable" takes kernels in JAX alone that compile for every
        platform, for programs that are exported.

    Raises:
      UserError: another value.
    """
    with _chosen(check_choice("kernels", kernels, _CHOICES)):
        yield


class Operation(Generic[P, R]):
    """A function on arrays whose definition can be replaced by a kernel.

    Positional arguments are arrays or None, the first with a leading batch axis. Options are keywords.
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
        kernels = importlib.import_module("structvit_jax.ops.kernels")  # which imports the definitions
        call = kernels.choose(self, arrays, bound.kwargs, portable=_chosen.value == "portable")
        return call()


def operation(check: Callable[..., None] | None = None) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorate the definition of an operation.

    Args:
      check: called with the same arguments; raises ValueError, in one line, for arguments that do not fit.
    """
    return lambda definition: Operation(definition, check)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
