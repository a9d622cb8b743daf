"""Why do D structure kernels not beat one on moving garments? Train variants of how the kernels are learned.

    python tests/tools/kernel_variants.py --folder DIR [--root DIR] [--seeds 3] [--steps 800]

Every variant is trained like an arm of configs/ablate_garments.py and scored on its validation clips, which
are made of training photographs. The variants change D = 4 in one respect each: the initial kernels, their
weight decay, their learning rate, or the weights that the run starts from. Some change ConvSA likewise.
Results are printed, and written to DIR/kernel_variants.json; re-run the command to resume.
"""

import argparse
import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from structvit_jax import data
from structvit_jax.analysis.ablate.results import compare
from structvit_jax.analysis.ablate.study import with_overrides
from structvit_jax.configs import ablate_garments
from structvit_jax.models import struct_attention
from structvit_jax.training import loop, optim
from structvit_jax.training.evaluation import read_result
from structvit_jax.utils.tables import markdown_table

FIRST_SEED = 1000  # as in the runs that select learning rates
NORMAL = struct_attention.normal_kernels


def orthogonal(key, shape, dtype=jnp.float32):
    """Return kernels that are orthogonal across D, with the norm that normal kernels have on average."""
    *window, heads, channels, dim = shape
    rows = jax.random.normal(key, (heads, channels, int(np.prod(window)), dim), dtype)
    rows = jnp.linalg.qr(rows)[0]
    return jnp.moveaxis(rows, 2, 0).reshape(shape)


def delta_and_noise(key, shape, dtype=jnp.float32):
    return struct_attention.delta_kernels(key, shape, dtype) + 0.5 * NORMAL(key, shape, dtype)


def equal_and_noise(key, shape, dtype=jnp.float32):
    """Return D times the same normal kernel, which equals ConvSA, with noise that sums to zero over D."""
    noise = 0.5 * NORMAL(jax.random.fold_in(key, 1), shape, dtype)
    return NORMAL(key, (*shape[:-1], 1), dtype) + noise - noise.mean(axis=-1, keepdims=True)


def larger(key, shape, dtype=jnp.float32):
    """Return normal kernels scaled by sqrt(D): the mean over D of the values keeps its variance."""
    return np.sqrt(shape[-1]) * NORMAL(key, shape, dtype)


def is_kernel(name):
    return name.endswith("_kernels")


@contextlib.contextmanager
def starting_with(kernels):
    """Use other initial kernels."""
    with mock.patch.dict(struct_attention.KERNEL_INITS, normal=kernels):
        yield


@contextlib.contextmanager
def without_decay():
    """Apply no weight decay to the kernels."""
    decays = optim.decays
    with mock.patch.object(optim, "decays", lambda name, array: decays(name, array) and not is_kernel(name)):
        yield


@contextlib.contextmanager
def at_rate(factor):
    """Multiply the learning rate of the kernels, in place of layer-wise rates, which should be on."""

    def rates(names, depths, decay):
        return {name: factor if is_kernel(name) else 1.0 for name in names}

    with mock.patch.object(optim, "layer_rates", rates):
        yield


class Variant(NamedTuple):
    """A variant of the training of a model."""

    dim: int  # D
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    changes: Mapping[str, float] = MappingProxyType({})
    start: str = ""  # the variant whose run with the same seed gives the weights


def variants():
    """Return the variants by name; contexts are used once, so each run needs new ones."""
    rates = {"optimizer.layer_decay": 0.5}
    return {
        "ConvSA": Variant(1),
        "D = 4": Variant(4),
        "D = 4, orthogonal": Variant(4, starting_with(orthogonal)),
        "D = 4, delta and noise": Variant(4, starting_with(delta_and_noise)),
        "D = 4, equal and noise": Variant(4, starting_with(equal_and_noise)),
        "D = 4, larger": Variant(4, starting_with(larger)),
        "D = 4, no decay": Variant(4, without_decay()),
        "D = 4, kernels at rate x 3": Variant(4, at_rate(3.0), rates),
        "D = 4, kernels at rate x 1/3": Variant(4, at_rate(1 / 3), rates),
        "ConvSA, delta and noise": Variant(1, starting_with(delta_and_noise)),
        "ConvSA, kernels at rate x 3": Variant(1, at_rate(3.0), rates),
        "ConvSA from ConvSA": Variant(1, start="ConvSA"),
        "D = 4 from ConvSA": Variant(4, start="ConvSA"),
    }


def train(name, seed, options):
    """Return the top-1 of a run; train it if it is not complete."""
    variant = variants()[name]
    changes = {
        "model.name": f"deit_tiny_struct_{variant.dim}_video",
        "train.seed": FIRST_SEED + seed,
        "train.duration": f"{options.steps} steps",
        "optimizer.lr": options.lr,
        "data.test_split": "tune",
        "data.root": options.root,
        **variant.changes,
    }
    if variant.start:
        changes["init_from"] = str(workdir(variant.start, seed, options))
    config = with_overrides(ablate_garments.get_config(), changes)
    folder = epath.Path(workdir(name, seed, options))
    if not (result := read_result(folder, options.steps)):
        with variant.context:
            dataset = data.load(config.data, config.augment, config.train.seed)
            result = loop.train(config, folder, dataset)
    return result["top1"]


def workdir(name, seed, options):
    return options.folder / name.replace(" ", "_").replace("/", "_") / f"seed={seed}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--root", default=ablate_garments.get_config().data.root)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=4e-3)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # messages of Orbax
    top1 = {name: [train(name, seed, options) for seed in range(options.seeds)] for name in variants()}
    rows = []
    for name, values in top1.items():
        found = compare(values, top1["ConvSA"])
        difference = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        rows.append([name, f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}", difference])
    print(markdown_table(["variant", "top-1", "difference from ConvSA"], rows))
    written = {"steps": options.steps, "lr": options.lr, "top1": top1}
    (options.folder / "kernel_variants.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
