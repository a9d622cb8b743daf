"""Compile the train step ahead of time, and report when a program does not fit into a device's memory."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections

from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import abstract, batch_sharding
from structvit_jax.runtime.processes import log
from structvit_jax.training.learner import Learner
from structvit_jax.training.step import TrainState, make_train_step
from structvit_jax.utils.errors import UserError


def compile_train_step(learner: Learner, state: TrainState) -> jax.stages.Compiled:
    """Compile the train step before its first call, and log how long this takes."""
    log("compiling the train step ...")
    started = time.monotonic()
    compiled = trace_train_step(learner, state).lower().compile()
    log(f"compiled in {time.monotonic() - started:.1f} s")
    processes.barrier()  # some processes may have found it in the compilation cache
    return compiled


def trace_train_step(learner: Learner, state: TrainState) -> jax.stages.Traced:
    """Trace the train step, for its jaxpr or to lower and compile it.

    Args:
      learner: what to train.
      state: arrays, or shapes as from `Learner.abstract_state`.
    """
    step_fn = make_train_step(
        learner.model, learner.optimizer, learner.schedule, learner.config, learner.mesh, state
    )
    rows, sharding = learner.config.data.batch_size, batch_sharding(learner.mesh)
    shapes = learner.row | {"mask": ((), jnp.bool_), "index": ((), jnp.int32)}
    batch = {
        key: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
        for key, (shape, dtype) in shapes.items()
    }
    return step_fn.trace(abstract(state, learner.mesh), batch)


def memory_of(compiled: jax.stages.Compiled) -> float:
    """Return the bytes that a program needs on one device: arguments, results, temporaries and code."""
    sizes = compiled.memory_analysis()
    assert sizes is not None
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )


@contextlib.contextmanager
def oom_as_user_error(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Turn out-of-memory errors into one line with the keys to change.

    Raises:
      UserError: names the requested and the available memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if not (isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", text)):
            raise
        parts, remat = config.train.grad_accum_steps, config.model.remat or "none"
        raise UserError(
            f"out of memory: {_requested(text)}; {_available()}. Lower config.data.batch_size (now"
            f" {config.data.batch_size}), raise config.train.grad_accum_steps (now {parts}) or"
            f" set config.model.remat (now {remat}) to 'dots' or 'full'; in evaluation lower"
            f" config.eval.batch_size (now {config.eval.batch_size}); `structvit plan --device_memory=SIZE`"
            " finds the largest batch"
        ) from error


def _requested(text: str) -> str:
    """Find the requested memory in a message of XLA."""
    amount = r"([\d.]+) ?([KMGT]i?B?|bytes)\b"
    verb = r"(?:allocat\w+|requires?|[Uu]sed|needs?) (?:a buffer of )?"
    match = re.search(verb + amount, text) or re.search(amount, text)
    if not match:
        return text[:200]
    number, unit = match.groups()
    if unit == "bytes":
        number, unit = f"{float(number) / 2**30:.1f}", " GiB"
    return f"the program asked for {number}{unit}"


def _available() -> str:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"a {device.device_kind} has " + (f"{limit / 2**30:.1f} GiB for it" if limit else "no more")
