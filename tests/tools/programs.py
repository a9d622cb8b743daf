"""Small programs whose traffic can be counted by hand, compiled ahead of time for TPUs (needs libtpu).

    python tests/tools/programs.py FOLDER [NAME ...]

writes the texts of all programs, or of the named ones, without parts that do not affect the count (stack
frames, most backend_configs). tests/fixtures/programs holds those of the versions in its README.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPU = {  # lets libtpu compile without a TPU, and in several processes at a time
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PAIRS = [(i, (i + 1) % 4) for i in range(4)]


def layer(x, scale):
    return jnp.sin(jax.lax.optimization_barrier(x) * scale)


def scanned(x, scales):
    """x is too large for vector memory: every step reads and writes it."""
    return jax.lax.scan(lambda x, scale: (layer(x, scale), None), x, scales)[0]


def unrolled(x, scales):
    for scale in scales:
        x = layer(x, scale)
    return x


def nested(x, scales):
    """Five times as many steps as `scanned`."""
    return jax.lax.fori_loop(0, 5, lambda i, x: scanned(x, scales), x)


def tolerance(x):
    with jax.named_scope("times7"):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: layer(x, 2.0), x)


def chain(x, y):
    """Small enough for vector memory, too large for one fusion."""
    y = jnp.tanh(x @ y) + x
    return jnp.sin(y) / jnp.sum(jnp.exp(y), axis=0)


def stacked(xs):
    """Read and write a slice of a stacked array in every step."""
    return jax.lax.map(lambda x: jnp.sin(x) * 2, xs)


def rows(table, sums, target, indices, new):
    """Gather, scatter and overwrite some rows of large arrays."""
    target = jax.lax.dynamic_update_slice(target, new, (indices[0], 0))
    return table[indices], sums.at[indices].add(new), target


def branches(which, x):
    """Only one branch writes x."""
    return jax.lax.cond(which > 0, jnp.sin, lambda x: x, x)


def trained(x, weights):
    """A gradient with named scopes; the scan stacks its residuals."""

    def loss(weights):
        with jax.named_scope("stage1"):
            y = jnp.tanh(x @ weights[0])
        with jax.named_scope("stage2"):
            y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, weights)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    return jax.grad(loss)(weights)


def multiply(x, y, cost=None):
    """A kernel for x @ y in blocks of 256 x 256, the inner axis last."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x_ref, y_ref, out_ref, sums):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        sums[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = sums[...].astype(out_ref.dtype)

    grid = (x.shape[0] // 256, y.shape[1] // 256, x.shape[1] // 256)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((256, 256), lambda i, j, k: (i, k)),
            pl.BlockSpec((256, 256), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((256, 256), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        scratch_shapes=[pltpu.VMEM((256, 256), jnp.float32)],
        cost_estimate=cost and pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=cost),
        name="multiply",
    )(x, y)


def copying(order, x):
    """A kernel that copies blocks of x itself, two in every step but the first, and reads x in two windows:
    the blocks of one change with every second step, those of the other follow `order`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(order_ref, hbm_ref, half_ref, any_ref, out_ref, block, semaphore):
        step = pl.program_id(0)

        def fetch(i, _):
            copy = pltpu.make_async_copy(hbm_ref.at[pl.ds(step * 128, 128)], block, semaphore)
            copy.start()
            copy.wait()
            return _

        @pl.when(step == 0)
        def _():
            fetch(0, None)

        @pl.when(step > 0)
        def _():
            jax.lax.fori_loop(0, 2, fetch, None)

        out_ref[...] = block[...] + half_ref[...] + any_ref[...]

    spec = partial(pl.BlockSpec, (128, x.shape[1]))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // 128,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                spec(lambda i, order: (jax.lax.div(i, 2), 0)),
                spec(lambda i, order: (order[i], 0)),
            ],
            out_specs=spec(lambda i, order: (i, 0)),
            scratch_shapes=[pltpu.VMEM((128, x.shape[1]), x.dtype), pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="copying",
    )(order, x, x, x)


def doubling(x):
    """A kernel whose last blocks extend beyond x."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    spec = pl.BlockSpec((256, 256), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid=(4, 2), in_specs=[spec], out_specs=spec, out_shape=shape)(x)


def collectives(x):
    """x is split over both axes; each collective runs over the four devices of the second."""
    return (
        jax.lax.psum(x, "b"),
        jax.lax.all_gather(x, "b", tiled=True),
        jax.lax.psum_scatter(x, "b", tiled=True),
        jax.lax.all_to_all(x, "b", 0, 1, tiled=True),
        jax.lax.ppermute(x, "b", PAIRS),
    )


def sharded(weights, x):
    """A step with weights split over axis b and the batch over both axes."""

    def loss(weights):
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    return weights - 0.1 * jax.grad(loss)(weights)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


BF16, INT = partial(array, dtype=jnp.bfloat16), partial(array, dtype=jnp.int32)
BIG, ROWS, TABLE = array(8192, 8192), array(64, 1024), array(65536, 1024)
FACTORS = BF16(1024, 512), BF16(512, 768)
# Programs for one chip: function, arguments, donated arguments.
PROGRAMS = {
    "scanned": (scanned, (BIG, array(6, 8192)), 0),
    "unrolled": (unrolled, (BIG, array(6, 8192)), 0),
    "nested": (nested, (BIG, array(6, 8192)), 0),
    "tolerance": (tolerance, (BIG,), 0),
    "chain": (chain, (array(1024, 1024),) * 2, ()),
    "stacked": (stacked, (array(8, 4096, 4096),), ()),
    "rows": (rows, (TABLE, TABLE, TABLE, INT(64), ROWS), (1, 2)),
    "branches": (branches, (INT(), BIG), 1),
    "trained": (trained, (BF16(65536, 1024), BF16(4, 1024, 1024)), ()),
    "kernel": (multiply, FACTORS, ()),
    "kernel_lies": (partial(multiply, cost=7), FACTORS, ()),
    "kernel_edges": (doubling, (array(1000, 512),), ()),
    "kernel_copies": (copying, (INT(8), array(1024, 512)), ()),
}
# Programs for eight chips, 2 x 4: function, arguments, their partitions.
SPLIT = {
    "collectives": (collectives, (array(8192, 1024),), ((("a", "b"),),)),
    "sharded": (sharded, (BF16(6, 2048, 2048), BF16(16384, 2048)), ((None, "b"), (("a", "b"),))),
}


def collectives_on(mesh):
    parts = PartitionSpec(("a", "b"))
    return jax.shard_map(collectives, mesh=mesh, in_specs=parts, out_specs=(parts,) * 5, check_vma=False)


def compile_for_tpu(name):
    from jax.experimental import topologies

    if name in PROGRAMS:
        function, arguments, donated = PROGRAMS[name]
        one = {"topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
        mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", **one).devices), ("a",))
        place = NamedSharding(mesh, PartitionSpec())
        jitted = jax.jit(function, in_shardings=place, out_shardings=place, donate_argnums=donated)
        return jitted.lower(*arguments).compile()
    function, arguments, splits = SPLIT[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
    places = [NamedSharding(mesh, PartitionSpec(*split)) for split in splits]
    if name == "collectives":
        return jax.jit(collectives_on(mesh), in_shardings=places).lower(*arguments).compile()
    return jax.jit(function, in_shardings=places, out_shardings=places[0]).lower(*arguments).compile()


def trimmed(text):
    """Return the text of a program without stack frames, file names and most backend_configs."""
    head, rest = text.split("\n", 1)
    body = rest[re.search(r"^(%|ENTRY )", rest, re.MULTILINE).start() :]
    lines = [
        line if "tpu_custom_call" in line else re.sub(r", backend_config=\{.*\}$", "", line)
        for line in re.sub(r" ?stack_frame_id=\d+", "", body).splitlines()
    ]
    return "\n".join([head, "", *lines, ""])


def main(folder, *names):
    os.environ.update(TPU)  # before libtpu is loaded
    jax.config.update("jax_traceback_in_locations_limit", 0)  # kernels would contain file paths
    for name in names or [*PROGRAMS, *SPLIT]:
        Path(folder, f"{name}.txt").write_text(trimmed(compile_for_tpu(name).as_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
