"""What a configuration will take, before it is paid for: the text of `--mode=plan`.

The real train step is compiled, for this machine's devices or ahead of time for chips that are not there,
and its program is asked for memory and traffic. Times follow from data sheets alone: the largest of
arithmetic, memory traffic and traffic between chips, as if each ran at its full rate beside the others. So
the efficiency that is printed is an upper bound, and no measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from structvit_jax.config import model_arguments
from structvit_jax.models import cost
from structvit_jax.performance import traffic
from structvit_jax.performance.hardware import CHIPS, Chip, Devices, devices_of
from structvit_jax.performance.operations import operations
from structvit_jax.runtime.mesh import check_batch, make_mesh
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import write
from structvit_jax.training.compilation import memory_of, trace_train_step
from structvit_jax.training.learner import Learner
from structvit_jax.utils.errors import UserError

_FOLDER = "plan"  # of the workdir: the compiled programs' texts


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one device in one step; bytes and operations."""

    batch: int  # examples on all devices
    memory: float  # that the program needs: weights, state, batch and temporaries
    operations: float  # those of matrix products and convolutions, recomputation included
    useful: float  # three times the forward pass's, by `cost`
    hbm: float
    sent: float
    guessed: tuple[str, ...] = ()  # loops of unknown length, whose traffic counts once


class Request(NamedTuple):
    """What to plan for."""

    topologies: Sequence[str] = ()  # chips, as "v5e:2x4" or "h100:8"; none is this machine
    device_batch: int = 0  # examples on a device; 0 is data.batch_size over all
    device_memory: str = ""  # of a device, as "24GB"; finds the largest batch that fits


def describe(config: ml_collections.ConfigDict, data: Any, workdir: epath.Path, request: Request) -> str:
    """Return what the train step takes, and write the programs' texts into WORKDIR/plan.

    Raises:
      UserError: an unknown topology, or a configuration that does not fit its devices.
    """
    lines = [_plan(config, data, workdir, target, request) for target in request.topologies or ["here"]]
    return "\n".join(lines)


def _plan(
    config: ml_collections.ConfigDict, data: Any, workdir: epath.Path, target: str, request: Request
) -> str:
    found = Devices(jax.devices()) if target == "here" else devices_of(target)
    devices, chip = found.devices, None if found.note else CHIPS.get(target.split(":")[0])
    path = workdir / _FOLDER / f"{target.replace(':', '_')}.txt"
    measure = functools.cache(functools.partial(_measure, config, data, found, path))
    lines = [f"{target}: {len(devices)} x {devices[0].device_kind}{found.note}"]
    batch = request.device_batch * len(devices) or config.data.batch_size
    if request.device_memory:
        memory, least = read_size(request.device_memory), len(devices) * config.train.grad_accum_steps
        batch = largest_batch(lambda size: measure(size).memory, memory, least, first=batch)
        lines.append(_advice(config, batch, memory))
    return "\n  ".join([*lines, *_tell(measure(batch), len(devices), chip)])


def _measure(
    config: ml_collections.ConfigDict, data: Any, found: Devices, path: epath.Path, batch: int
) -> Figures:
    """Compiles the train step for these devices and takes its program apart."""
    devices = found.devices
    config = config.copy_and_resolve_references()
    config.data.batch_size = batch
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_batch(mesh, "data.batch_size", batch, config.train.grad_accum_steps)
    learner = Learner.create(config, data, mesh)
    log(f"compiling the train step for {len(devices)} x {devices[0].device_kind}, {batch} examples ...")
    started = time.monotonic()
    traced = trace_train_step(learner, learner.abstract_state())
    made = operations(traced.jaxpr)
    arguments = model_arguments(config)
    forward = cost(arguments.pop("name"), data.shape, len(data.class_names), **arguments).macs
    useful = 3 * 2 * forward * batch / len(devices)
    try:
        compiled = traced.lower().compile(compiler_options=found.options)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not used:
            raise UserError(f"{batch} examples do not fit: {' '.join(str(error).split())[:300]}") from error
        memory = float(used[1]) * 1024 ** (1 + "KMGT".index(used[2]))
        return Figures(batch, memory, made / len(devices), useful, math.nan, math.nan)
    text = compiled.as_text()
    log(f"compiled in {time.monotonic() - started:.0f} s, a program of {text.count(chr(10)):,} lines")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
    moved = traffic.count(text, unknown=1)
    guessed = [name for name in moved.guessed if "augment" not in name]  # mixup's draw: a few scalars
    memory = memory_of(compiled)
    return Figures(batch, memory, made / len(devices), useful, moved.hbm, moved.sent, tuple(guessed))


def _tell(figures: Figures, devices: int, chip: Chip | None) -> list[str]:
    """A device's figures in words; with a data sheet also the times that they imply."""
    per = figures.batch / devices
    capacity = f" of {_si(chip.memory, 'B')}" if chip else ""
    fits = " DOES NOT FIT" if chip and figures.memory > chip.memory else ""
    lines = [
        f"batch {figures.batch}, {per:g} a device",
        f"memory {_si(figures.memory, 'B')}{capacity}{fits}",
        f"operations {_si(figures.operations)} ({_si(figures.useful)} without recomputation),"
        f" {_si(figures.operations / per)} an example",
    ]
    if math.isnan(figures.hbm):
        return lines
    lines += [
        f"memory traffic {_si(figures.hbm, 'B')}, {_si(figures.hbm / per, 'B')} an example",
        f"sent to other devices {_si(figures.sent, 'B')}",
    ]
    lines += [f"NOTE: the traffic of this loop, of unknown length, counts once: {x}" for x in figures.guessed]
    if chip:
        times = {
            "arithmetic": figures.operations / chip.flops,
            "memory": figures.hbm / chip.bandwidth,
            "links": figures.sent / chip.links,
        }
        bound = max(times, key=times.__getitem__)
        by = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
        share = figures.useful / chip.flops / times[bound]
        lines += [
            f"time by data sheet: {by}: bound by {bound}",
            f"at most {figures.batch / times[bound]:.0f} examples/s on all, {share:.1%} of peak arithmetic",
        ]
    return lines


def _si(value: float, unit: str = "") -> str:
    power = sum(value >= 1000.0**n for n in (1, 2, 3, 4))
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


def read_size(text: str) -> float:
    """Bytes in "24GB" or "16GiB".

    Raises:
      UserError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT])(i?)B?\s*", text)
    if not match:
        raise UserError(f"--device_memory={text}: write 24GB, or 16GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2]))


def largest_batch(needs: Callable[[int], float], memory: float, least: int, *, first: int) -> int:
    """The largest multiple of `least` whose program needs no more than `memory` bytes.

    Memory grows about linearly, so the two programs nearest to the limit tell where to look next.

    Raises:
      UserError: not even `least` fits.
    """
    known: dict[int, float] = {}  # by multiples of `least`: what a program needs
    low, high, guess = 0, math.inf, max(1, first // least)
    while high - low > 1:
        known[guess] = needs(guess * least)
        low, high = (guess, high) if known[guess] <= memory else (low, guess)
        if high == 1:
            raise UserError(
                f"not even {least} examples fit into {_si(memory, 'B')}: they need {_si(known[1], 'B')};"
                " set config.model.remat"
            )
        if len(known) == 1:
            guess = 2 * guess if low else max(1, guess // 2)
            continue
        near = sorted(known, key=lambda units: abs(known[units] - memory))[:2]
        slope = (known[near[0]] - known[near[1]]) / (near[0] - near[1])
        guess = near[0] + math.floor((memory - known[near[0]]) / slope) if slope > 0 else 2 * max(known)
        if math.isfinite(high) and len(known) % 3 == 0:  # where growth is uneven
            guess = (low + int(high)) // 2
        guess = int(min(max(guess, low + 1), high - 1))
    return low * least


def _advice(config: ml_collections.ConfigDict, batch: int, memory: float) -> str:
    lr = config.optimizer.lr * batch / config.data.batch_size
    return (
        f"largest batch in {_si(memory, 'B')} a device: --config.data.batch_size={batch}"
        f" --config.optimizer.lr={lr:.3g} (the linear scaling rule: in proportion to the batch)"
    )
