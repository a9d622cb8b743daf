"""The train step as a compiled program: what it takes, and what it says when the device is too small."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from structvit_jax.runtime import processes
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.sharding import abstract, batch_sharding
from structvit_jax.training.run import Run
from structvit_jax.training.step import TrainState, make_train_step
from structvit_jax.utils.errors import UserError


def compile_train_step(run: Run, state: TrainState) -> Any:
    """The train step, compiled ahead of its first call so that the wait has a name."""
    log("compiling the train step ...")
    started = time.monotonic()
    compiled = trace_train_step(run, state).lower().compile()
    log(f"compiled in {time.monotonic() - started:.1f} s")
    processes.barrier()  # not all may have found it in the compilation cache
    return compiled


def trace_train_step(run: Run, state: Any) -> Any:
    """The train step for the run's mesh, as `jax.jit` traces it: with a `.jaxpr`, and `.lower()` to compile.
    Only the shapes of `state` are needed."""
    step_fn = make_train_step(run.model, run.optimizer, run.schedule, run.config, run.mesh, state)
    return step_fn.trace(abstract(state, run.mesh), abstract_batch(run))


def memory_of(compiled: Any) -> float:
    """Bytes that a compiled program needs on one device: arguments, results, temporaries and code."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )


def abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a step gets."""
    rows, sharding = run.config.data.batch_size, batch_sharding(run.mesh)
    shapes = run.data.arrays | {"mask": ((), jnp.bool_), "index": ((), jnp.int32)}
    return {
        key: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
        for key, (shape, dtype) in shapes.items()
    }


@contextlib.contextmanager
def oom_as_user_error(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Turns a device's lack of memory into one line that says what to change.

    Raises:
      UserError: says what was asked for, and what the device has.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if not (isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", text)):
            raise
        raise UserError(
            f"out of memory: {_asked(text)}; {_device_has()}. Lower config.data.batch_size (now"
            f" {config.data.batch_size}), raise config.train.grad_accum_steps (now {config.train.grad_accum_steps})"
            f" or set config.model.remat (now {config.model.remat or 'none'}) to 'dots' or 'full';"
            f" in evaluation lower config.eval.batch_size (now {config.eval.batch_size});"
            " `structvit plan --device_memory=SIZE` finds the largest batch"
        ) from error


def _asked(text: str) -> str:
    """What a message of XLA says was asked for."""
    amount = r"([\d.]+) ?([KMGT]i?B?|bytes)\b"
    verb = r"(?:allocat\w+|requires?|[Uu]sed|needs?) (?:a buffer of )?"
    match = re.search(verb + amount, text) or re.search(amount, text)
    if not match:
        return text[:200]
    number, unit = match.groups()
    if unit == "bytes":
        number, unit = f"{float(number) / 2**30:.1f}", " GiB"
    return f"the program asked for {number}{unit}"


def _device_has() -> str:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"a {device.device_kind} has " + (f"{limit / 2**30:.1f} GiB for it" if limit else "no more")
