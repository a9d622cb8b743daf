"""Estimate what a configuration needs before renting hardware: `structvit plan`.

The train step is compiled for this machine's devices, or ahead of time for chips that are not attached.
Memory and traffic are read from the compiled program. Times come from data sheets alone: the largest of
arithmetic, memory traffic and traffic between chips, each at its full rate and overlapping with the others.
The printed efficiency is therefore an upper bound, not a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
from etils import epath

from structvit_jax.config import model_arguments
from structvit_jax.data import Dataset
from structvit_jax.performance import traffic
from structvit_jax.performance.cost import cost, count_flops
from structvit_jax.performance.hardware import Chip, Devices, devices_of
from structvit_jax.runtime.mesh import check_batch, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import write
from structvit_jax.training.learner import Learner, memory_of, trace_train_step
from structvit_jax.utils.errors import UserError

_FOLDER = "plan"  # in the workdir: texts of compiled programs
_HERE = "here"  # in place of a topology: this machine


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one train step on one device."""

    batch: int  # examples on all devices
    memory: float  # bytes of weights, state, batch and temporaries
    operations: float  # of matrix products and convolutions, recomputation included
    useful: float  # operations without recomputation: three forward passes
    moved: traffic.Traffic | None  # None if the compiler ran out of memory


class Request(NamedTuple):
    """What to plan for."""

    topologies: Sequence[str] = ()  # as "v5e:2x4" or "h100:8"; none is this machine
    device_batch: int = 0  # examples per device; 0 splits data.batch_size over all
    device_memory: str = ""  # of a device, as "24GB": find the largest batch that fits


def describe(config: ml_collections.ConfigDict, data: Dataset, workdir: epath.Path, request: Request) -> str:
    """Return the cost of the train step as text; write the compiled programs to WORKDIR/plan.

    Raises:
      UserError: an unknown topology, a size that cannot be read, or a configuration that does not fit.
    """
    plans = (_plan(config, data, workdir, target, request) for target in request.topologies or [_HERE])
    return "\n".join(plans)


def _plan(
    config: ml_collections.ConfigDict, data: Dataset, workdir: epath.Path, target: str, request: Request
) -> str:
    found = Devices(jax.devices()) if target == _HERE else devices_of(target)
    count = len(found.devices)
    path = workdir / _FOLDER / f"{target.replace(':', '_')}.txt"
    measure = functools.cache(functools.partial(_measure, config, data, found, path))
    title = f"{target}: {count} x {found.devices[0].device_kind}"
    if found.missing:
        title += f" in place of {target.partition(':')[0]}: {found.missing.value} is not installed"
    lines, batch = [title], request.device_batch * count or config.data.batch_size
    if request.device_memory:
        memory, multiple = read_size(request.device_memory), count * config.train.grad_accum_steps
        batch = largest_batch(lambda size: measure(size).memory, memory, multiple, first=batch)
        lr = config.optimizer.lr * batch / config.data.batch_size
        lines.append(
            f"largest batch in {_si(memory, 'B')} per device: --config.data.batch_size={batch}"
            f" --config.optimizer.lr={lr:.3g} (linear scaling rule: in proportion to the batch)"
        )
    return "\n  ".join([*lines, *_describe_step(measure(batch), count, found.chip)])


def _measure(
    config: ml_collections.ConfigDict, data: Dataset, found: Devices, path: epath.Path, batch: int
) -> StepCost:
    """Compile the train step for these devices, count its cost and write its text to `path`."""
    count, kind = len(found.devices), found.devices[0].device_kind
    config = config.copy_and_resolve_references()
    config.data.batch_size = batch
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, found.devices)
    check_batch(mesh, "data.batch_size", batch, config.train.grad_accum_steps)
    learner = Learner.create(config, data, mesh)
    log(f"compiling the train step for {count} x {kind}, {batch} examples ...")
    started = time.monotonic()
    traced = trace_train_step(learner, learner.abstract_state())
    arguments = model_arguments(config)
    forward = cost(arguments.pop("name"), data.shape, len(data.class_names), **arguments).macs
    operations, useful = count_flops(traced.jaxpr) / count, 3 * 2 * forward * batch / count
    try:
        compiled = traced.lower().compile(compiler_options=found.options)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+[KMGT])", text)
        if not used:
            raise UserError(f"{batch} examples do not fit: {text[:300]}") from error
        return StepCost(batch, read_size(f"{used[1]}iB"), operations, useful, None)
    text = compiled.as_text()
    log(f"compiled in {time.monotonic() - started:.0f} s, a program of {text.count(chr(10)):,} lines")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
    return StepCost(batch, memory_of(compiled), operations, useful, traffic.count(text, unknown=1))


def _describe_step(step: StepCost, devices: int, chip: Chip | None) -> list[str]:
    """Return the lines on a step; with a data sheet also the times that it implies."""
    per_device = step.batch / devices
    capacity = f" of {_si(chip.memory, 'B')}" if chip else ""
    fits = " DOES NOT FIT" if chip and step.memory > chip.memory else ""
    lines = [
        f"batch {step.batch}, {per_device:g} per device",
        f"memory {_si(step.memory, 'B')}{capacity}{fits}",
        f"operations {_si(step.operations)} ({_si(step.useful)} without recomputation),"
        f" {_si(step.operations / per_device)} per example",
    ]
    moved = step.moved
    if moved is None:
        return lines
    lines += [
        f"memory traffic {_si(moved.hbm, 'B')}, {_si(moved.hbm / per_device, 'B')} per example",
        f"sent to other devices {_si(moved.sent, 'B')}",
    ]
    guessed = (loop for loop in moved.guessed if "augment" not in loop)  # mixup draws a few scalars
    lines += [
        f"NOTE: the length of this loop is unknown, its traffic counts once: {loop}" for loop in guessed
    ]
    if chip:
        times = {
            "arithmetic": step.operations / chip.flops,
            "memory": moved.hbm / chip.bandwidth,
            "links": moved.sent / chip.links,
        }
        bound = max(times, key=times.__getitem__)
        by_part = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
        efficiency = step.useful / chip.flops / times[bound]
        lines += [
            f"time by data sheet: {by_part}: bound by {bound}",
            f"at most {step.batch / times[bound]:.0f} examples/s on all, {efficiency:.1%} of peak arithmetic",
        ]
    return lines


def _si(value: float, unit: str = "") -> str:
    power = sum(value >= 1000.0**n for n in (1, 2, 3, 4))
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def read_size(text: str) -> float:
    """Return the bytes in "24GB" or "16GiB".

    Raises:
      UserError: any other text.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?)\s*([KMGT])(i?)B?\s*", text)
    if not match:
        raise UserError(f"--device_memory={text}: write 24GB, or 16GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2]))


def largest_batch(needs: Callable[[int], float], memory: float, multiple: int, *, first: int) -> int:
    """Find the largest batch that fits into memory, with few evaluations of `needs`.

    Memory grows about linearly, so the two batches nearest to the limit predict the next one to try.

    Args:
      needs: returns the bytes that a batch needs.
      memory: bytes that there are.
      multiple: batches are multiples of this.
      first: batch to try first.

    Raises:
      UserError: not even `multiple` examples fit.
    """
    known: dict[int, float] = {}  # bytes by batch / multiple
    low, high, guess = 0, math.inf, max(1, first // multiple)
    while high - low > 1:
        known[guess] = needs(guess * multiple)
        low, high = (guess, high) if known[guess] <= memory else (low, guess)
        if high == 1:
            raise UserError(
                f"not even {multiple} examples fit into {_si(memory, 'B')}: they need {_si(known[1], 'B')};"
                " set config.model.remat"
            )
        if len(known) == 1:
            guess = 2 * guess if low else max(1, guess // 2)
            continue
        near = sorted(known, key=lambda units: abs(known[units] - memory))[:2]
        slope = (known[near[0]] - known[near[1]]) / (near[0] - near[1])
        guess = near[0] + math.floor((memory - known[near[0]]) / slope) if slope > 0 else 2 * max(known)
        if math.isfinite(high) and len(known) % 3 == 0:  # bisect where growth is uneven
            guess = (low + int(high)) // 2
        guess = int(min(max(guess, low + 1), high - 1))
    return low * multiple
