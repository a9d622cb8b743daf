"""Data sheets of accelerators, and device descriptions to compile for accelerators that are not attached."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import NamedTuple

import jax
from jax.experimental import topologies

from structvit_jax.utils.errors import UserError, did_you_mean, unknown_choice


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of one chip, from cloud.google.com/tpu/docs or from NVIDIA, as of November 2026."""

    flops: float  # bfloat16 operations per second, in dense matrix products
    memory: float  # bytes
    bandwidth: float  # bytes per second from and to memory
    links: float  # bytes per second that all links together send to other chips of the pod or node


TPUS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
}
GPUS = {
    "a100": Chip(312e12, 80e9, 2039e9, 300e9),  # SXM
    "h100": Chip(989e12, 80e9, 3350e9, 450e9),  # SXM
    "h200": Chip(989e12, 141e9, 4800e9, 450e9),
}
CHIPS = TPUS | GPUS
# Examples for error messages; other shapes work, too. "h100:8" is one node of 8 GPUs, "h100:4x8" four nodes.
EXAMPLES = (
    *("v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16", "v5p:1x1x1", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8"),
    *("a100:1", "h100:1", "h100:8", "h100:4x8", "h200:8"),
)

_MAX_CHIPS = 4096  # per topology: without a compiler, each chip needs a fake CPU device


class Compiler(enum.Enum):
    """A compiler for chips that are not attached. The value names the package that contains it."""

    TPU = "libtpu ('jax[tpu]')"
    GPU = "JAX's CUDA plugin ('jax[cuda13]')"

    @property
    def is_installed(self) -> bool:
        if self is Compiler.TPU:
            return importlib.util.find_spec("libtpu") is not None
        return not {"xla_cuda12", "xla_cuda13"}.isdisjoint(
            plugin.name for plugin in entry_points(group="jax_plugins")
        )


class Devices(NamedTuple):
    """Devices to compile for."""

    devices: list[jax.Device]
    chip: Chip | None = None  # data sheet; None for devices of this machine and for fake devices
    missing: Compiler | None = None  # compiler that is not installed; `devices` are then fake CPU devices
    options: dict[str, bool] | None = None  # compiler options of XLA


def devices_of(topology: str) -> Devices:
    """Return the devices of a topology, such as "v5e:2x4" or "h100:8".

    If no compiler for these chips is installed, return fake CPU devices instead. `add_fake_devices` must have
    created them.

    Raises:
      UserError: the topology is unknown, or there are too few fake devices.
    """
    generation, _, shape = topology.partition(":")
    compiler, count = _compiler(topology), _count(topology)
    if not compiler.is_installed:
        fake = jax.devices("cpu")[:count]
        if len(fake) < count:
            raise UserError(f"compiling for {topology} needs {compiler.value}")
        return Devices(fake, missing=compiler)
    try:
        described = _tpus(topology, count) if generation in TPUS else _gpus(generation, shape)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        hint = did_you_mean(topology, EXAMPLES)
        raise UserError(f"there is no topology {topology!r} ({error}).{hint}") from error
    # XLA chooses tile sizes for its own matrix products by timing them on a GPU. Use cuBLAS instead.
    options = {"xla_gpu_enable_triton_gemm": False} if generation in GPUS else None
    return Devices(list(described.devices), CHIPS[generation], options=options)


def add_fake_devices(topology_names: Sequence[str]) -> None:
    """Create enough fake CPU devices for all topologies that have no compiler here.

    Call this before JAX opens a device.
    """
    fake = [_count(topology) for topology in topology_names if not _compiler(topology).is_installed]
    if fake:
        jax.config.update("jax_num_cpu_devices", max(fake))


def _compiler(topology: str) -> Compiler:
    return Compiler.GPU if topology.partition(":")[0] in GPUS else Compiler.TPU


def _count(topology: str) -> int:
    """Return the number of chips of a topology.

    Raises:
      UserError: the topology is unknown, or has too many chips.
    """
    generation, _, shape = topology.partition(":")
    n = r"[1-9]\d{0,3}"
    pattern = rf"{n}x{n}(x{n})?" if generation in TPUS else rf"({n}x)?{n}"
    if generation not in CHIPS or not re.fullmatch(pattern, shape):
        raise unknown_choice("topology", topology, EXAMPLES)
    if (chips := math.prod(map(int, shape.split("x")))) > _MAX_CHIPS:
        raise UserError(f"{topology} has {chips:,} chips; the limit is {_MAX_CHIPS:,}")
    return chips


def _tpus(topology: str, count: int) -> topologies.TopologyDescription:
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)


_WITHOUT_TPU = {  # environment variables with which libtpu compiles on a machine without a TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _gpus(generation: str, shape: str) -> topologies.TopologyDescription:
    chip, (name, traits) = GPUS[generation], _GPU_TRAITS[generation]
    nodes, gpus = shape.split("x") if "x" in shape else ("1", shape)
    sizes = {"memory_bandwidth": int(chip.bandwidth), "device_memory_size": int(chip.memory)}
    info = " ".join(f"{key}: {value}" for key, value in (_EVERY_GPU | traits | sizes).items())
    target = (
        f"gpu_device_info {{ {info} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
        f' runtime_version {{ major: 12 minor: 9 }} device_description_str: "{name}"'
    )
    return topologies.get_topology_desc(
        name, platform="cuda", topology=f"1x{nodes}x{gpus}", target_config=target
    )


# Properties of a GPU that XLA needs to compile for it, with the values that its driver reports.
_EVERY_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}
_HOPPER = {
    "cuda_compute_capability": "{ major: 9 }",
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 2**20,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}
_AMPERE = {
    "cuda_compute_capability": "{ major: 8 }",
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 40 * 2**20,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
}
_GPU_TRAITS = {
    "a100": ("NVIDIA A100-SXM4-80GB", _AMPERE),
    "h100": ("NVIDIA H100 80GB HBM3", _HOPPER),
    "h200": ("NVIDIA H200", _HOPPER),
}
