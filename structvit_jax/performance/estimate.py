"""Estimate memory and step time before renting hardware: `structvit plan`.

The train step is compiled for the devices of this machine, or ahead of time for chips that are not attached.
Memory and traffic are read from the compiled program, operations from the traced program. Step times follow
from data sheets. Arithmetic, memory traffic and traffic between chips are assumed to run in parallel, each at
its peak rate, so the slowest of the three is the step time. It is a lower bound, not a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable

import jax
import ml_collections
from etils import epath

from structvit_jax.data import Dataset
from structvit_jax.ops import use_kernels
from structvit_jax.performance import traffic
from structvit_jax.performance.cost import count_flops
from structvit_jax.performance.hardware import Chip, Devices, devices_of
from structvit_jax.runtime.mesh import check_batch, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import write
from structvit_jax.training.learner import Learner, memory_of, trace_train_step
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one train step on one device."""

    batch: int  # examples, summed over all devices
    memory: float  # bytes of weights, optimizer state, batch and temporaries
    operations: float  # floating-point operations in matrix products and convolutions
    useful: float  # operations, without those that are repeated because of `config.model.remat`
    moved: traffic.Traffic | None  # None if the compiler ran out of memory


def describe(
    config: ml_collections.ConfigDict,
    data: Dataset,
    workdir: epath.Path,
    *,
    topology: str = "",
    device_batch: int | None = None,
    device_memory: str = "",
) -> str:
    """Return the cost of the train step as text, and write the compiled program to WORKDIR/plan.

    Args:
      config: configuration of the run.
      data: data set of the run; only its shapes and counts are used.
      workdir: folder for the compiled program.
      topology: chips to compile for, such as "v5e:2x4" or "h100:8"; "" compiles for this machine's devices.
      device_batch: examples per device; by default `data.batch_size` is split over all devices.
      device_memory: memory of each device, such as "24GB"; if set, find the largest batch that fits.

    Raises:
      UserError: an unknown topology, an invalid size, or a configuration that does not fit.
    """
    memory = read_size(device_memory) if device_memory else None
    target = devices_of(topology) if topology else Devices(jax.devices())
    name, count = topology or "here", len(target.devices)
    path = workdir / "plan" / f"{name.replace(':', '_')}.txt"
    measure = functools.cache(functools.partial(_measure, config, data, target, path))
    title = f"{name}: {count} x {target.devices[0].device_kind}"
    if target.missing:
        title += f" (fake devices: {target.missing.value} is not installed)"
    lines, batch = [title], device_batch * count if device_batch else config.data.batch_size
    if memory is not None:
        multiple = count * config.train.grad_accum_steps
        batch = largest_batch(lambda size: measure(size).memory, memory, multiple, first=batch)
        lr = config.optimizer.lr * batch / config.data.batch_size
        lines.append(
            f"largest batch in {_si(memory, 'B')} per device: --config.data.batch_size={batch}"
            f" --config.optimizer.lr={lr:.3g} (linear scaling: proportional to the batch)"
        )
    return "\n  ".join([*lines, *_describe_step(measure(batch), count, target.chip)])


def _measure(
    config: ml_collections.ConfigDict, data: Dataset, target: Devices, path: epath.Path, batch: int
) -> StepCost:
    """Compile the train step, write the text of the program to `path`, and return the cost of the step."""
    count = len(target.devices)
    config = config.copy_and_resolve_references()
    config.data.batch_size = batch
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, target.devices)
    check_batch(mesh, "data.batch_size", batch, config.train.grad_accum_steps)
    learner = Learner.create(config, data, mesh)
    log(f"compiling the train step for {count} x {target.devices[0].device_kind}, {batch} examples ...")
    started = time.monotonic()
    operations = useful = count_step_flops(learner) / count
    if learner.model.variant.remat != "none":
        without = config.copy_and_resolve_references()
        without.model.remat = "none"
        useful = count_step_flops(Learner.create(without, data, mesh)) / count
    step = StepCost(batch, math.inf, operations, useful, moved=None)
    lowered = trace_train_step(learner, learner.abstract_state()).lower()
    try:
        compiled = lowered.compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+[KMGT])", text)
        if not used:
            raise UserError(f"{batch} examples do not fit: {text[:300]}") from error
        return dataclasses.replace(step, memory=read_size(f"{used[1]}iB"))
    text = compiled.as_text()
    log(f"compiled in {time.monotonic() - started:.0f} s; the program has {text.count(chr(10)):,} lines")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
    return dataclasses.replace(step, memory=memory_of(compiled), moved=traffic.count(text))


def count_step_flops(learner: Learner) -> int:
    """Count the operations of a train step on all devices, see `count_flops`.

    The step is traced without kernels, so operations that kernels recompute are not counted.
    """
    with use_kernels("reference"):
        return count_flops(trace_train_step(learner, learner.abstract_state()).jaxpr)


def _describe_step(step: StepCost, devices: int, chip: Chip | None) -> list[str]:
    """Return lines with the cost of a step; if the chip is known, also with bounds of its step time."""
    per_device = step.batch / devices
    capacity = f" of {_si(chip.memory, 'B')}" if chip else ""
    fits = " DOES NOT FIT" if chip and step.memory > chip.memory else ""
    lines = [
        f"batch {step.batch}, {per_device:g} per device",
        f"memory {_si(step.memory, 'B')}{capacity}{fits}",
        f"operations {_si(step.operations)} ({_si(step.useful)} without rematerialisation),"
        f" {_si(step.operations / per_device)} per example",
    ]
    moved = step.moved
    if moved is None:
        return lines
    lines += [
        f"memory traffic {_si(moved.hbm, 'B')}, {_si(moved.hbm / per_device, 'B')} per example",
        f"sent to other devices {_si(moved.sent, 'B')}",
    ]
    # Loops of the augmentation only draw a few random scalars for mixup; no note about them.
    unknown = (loop for loop in moved.unknown_loops if "augment" not in loop)
    lines += [f"NOTE: a loop of unknown length counts as one step: {loop}" for loop in unknown]
    if chip:
        times = {
            "arithmetic": step.operations / chip.flops,
            "memory": moved.hbm / chip.bandwidth,
            "links": moved.sent / chip.links,
        }
        bound = max(times, key=times.__getitem__)
        by_resource = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
        efficiency = step.useful / chip.flops / times[bound]
        lines += [
            f"time at the rates of the data sheet: {by_resource}; bound by {bound}",
            f"at most {step.batch / times[bound]:.0f} examples/s on all devices,"
            f" {efficiency:.1%} of peak arithmetic",
        ]
    return lines


def _si(value: float, unit: str = "") -> str:
    """Return a number with an SI prefix, such as "24.5 GB"."""
    power = sum(value >= 1000.0**n for n in (1, 2, 3, 4))
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def read_size(text: str) -> float:
    """Parse a size such as "24GB" or "16GiB", and return it in bytes.

    Raises:
      UserError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?)\s*([KMGT])(i?)B?\s*", text)
    if not match:
        raise UserError(f"--device_memory={text} is not a size such as 24GB or 16GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2]))


def largest_batch(needs: Callable[[int], float], memory: float, multiple: int, *, first: int) -> int:
    """Return the largest batch that fits into memory.

    Each call of `needs` compiles a program, so only a few batches are tried. Memory grows about linearly with
    the batch, so the next batch to try is extrapolated from the two whose memory is nearest to the limit.

    Args:
      needs: function that returns the bytes that a batch needs.
      memory: available memory in bytes.
      multiple: the result is a multiple of this.
      first: the batch to try first.

    Raises:
      UserError: a batch of `multiple` examples does not fit.
    """
    known: dict[int, float] = {}  # bytes that were measured, by batch / multiple
    fits, too_large, guess = 0, math.inf, max(1, first // multiple)
    while too_large - fits > 1:
        known[guess] = needs(guess * multiple)
        if known[guess] <= memory:
            fits = guess
        elif guess > 1:
            too_large = guess
        else:
            raise UserError(
                f"not even {multiple} examples fit into {_si(memory, 'B')}: they need {_si(known[1], 'B')};"
                " to reduce memory, set config.model.remat"
            )
        if len(known) == 1:
            guess = 2 * guess if fits else guess // 2
            continue
        near, next_near = sorted(known, key=lambda units: abs(known[units] - memory))[:2]
        slope = (known[near] - known[next_near]) / (near - next_near)
        guess = near + math.floor((memory - known[near]) / slope) if slope > 0 else 2 * max(known)
        if math.isfinite(too_large) and len(known) % 3 == 0:  # bisect, in case growth is uneven
            guess = (fits + int(too_large)) // 2
        guess = int(min(max(guess, fits + 1), too_large - 1))
    return fits * multiple
