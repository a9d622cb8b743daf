"""Does a StructViT that starts from a UniFormer learn distinct structure kernels, and at what cost?

    python tests/tools/warm_start.py [--seeds 3] [--steps 100] [--folder DIR]

For every seed, train a tiny UniFormer on moving digits and, from its weights, three StructViTs with D = 4:
with kernels that start as plain attention and noise that sets them apart ("delta"), the same without noise,
and with fresh kernels ("fresh"). Print accuracies and, before and after training, the mean cosine between the
learned parts of the D kernels of a layer (kernel - delta) and the mean effective rank of the dynamic kernels
kappa over positions. Exit with 1 if "delta" is worse than "fresh" by more than one standard deviation, or if
its cosine is not below 0.9.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from structvit_jax import convert, data, ops
from structvit_jax.config import model_arguments
from structvit_jax.models import StructAttention, create_model, weights
from structvit_jax.runtime.mesh import make_mesh
from structvit_jax.training.card import from_card
from structvit_jax.training.restore import open_checkpoint
from structvit_jax.training.start import find_weights
from structvit_jax.training.step import normalize

ROOT = Path(__file__).parent.parent.parent
MODEL = "--config.model.name=structvit_tiny_4_1_video"
STARTS = {
    "delta": [MODEL],
    "delta, no noise": [MODEL, "--config.init.noise=0"],
    "fresh": [MODEL, "--config.init.kernels=fresh"],
}


def train(workdir, *arguments):
    """Train moving digits in a workdir and return the top-1 accuracy."""
    command = [sys.executable, "-m", "structvit_jax.main", "--config=configs/moving_digits.py"]
    done = subprocess.run(
        [*command, *arguments, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((workdir / "result.json").read_text())["top1"]


def cosine(arrays):
    """Return the mean cosine between the D kernels of a head minus delta, over pairs, heads and layers.

    It is NaN if nothing was learned.
    """
    means = []
    for name, array in arrays.items():
        if name.endswith("_kernels"):
            centre = tuple((k - 1) // 2 for k in array.shape[:-3])
            apart = np.array(array)
            apart[centre] -= 1
            *_, heads, _, dim = apart.shape
            rows = np.moveaxis(apart.reshape(-1, *apart.shape[-3:]), 1, 0).reshape(heads, -1, dim)
            with np.errstate(invalid="ignore"):
                unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            products = np.einsum("hmd,hme->hde", unit, unit)
            means.append(products[:, ~np.eye(dim, dtype=bool)].mean())
    return float(np.mean(means))


def mean_rank(model, clips, queries=8):
    """Return the mean effective rank of kappa over positions, at a few queries of every layer."""
    inputs, call = [], StructAttention.__call__

    def record(layer, x):
        inputs.append((layer, x))
        return call(layer, x)

    with mock.patch.object(StructAttention, "__call__", record):
        model(clips)
    ranks = []
    for layer, x in inputs:
        positions = int(np.prod(x.shape[1:-1]))
        kappa = layer.maps(x, np.linspace(0, positions - 1, queries).astype(int)).kappa
        axes = model.variant.grid_axes
        kappa = jnp.moveaxis(kappa, -1, 3)  # [batch, Q, heads, channels, *grid', *window]
        kappa = kappa.reshape(*kappa.shape[:4], int(np.prod(kappa.shape[4 : 4 + axes])), -1)
        ranks.append(float(ops.effective_rank(kappa).mean()))
    return float(np.mean(ranks))


def measure(workdir, initial=None):
    """Return the cosine and the effective rank of a run's model, or of the model that `initial` gives it."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    with open_checkpoint(str(workdir)) as (checkpoints, step):
        card = checkpoints.card(step)
        arrays, _ = checkpoints.whole(step, mesh)
    config = from_card(card["config"], "card")
    seed, classes = config.train.seed, len(card["class_names"])
    model = create_model(**model_arguments(config), num_classes=classes, seed=seed)
    own = weights.split(model)[1]
    if initial:
        rules = convert.Rules(**config.init, seed=seed)
        source = find_weights(str(initial), mesh)
        fresh = own.params | own.batch_stats
        arrays = convert.adapt(source, fresh, model.variant, tuple(card["class_names"]), rules).arrays
    weights.update(model, weights.cast_like(own, arrays))
    clips = next(data.load(config.data, config.augment).test_batches(8))["inputs"][:, 0]
    return cosine(arrays), mean_rank(model, normalize(jnp.asarray(clips), config))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # messages of Orbax
    folder = options.folder or Path(tempfile.mkdtemp(prefix="warm_start"))
    top1 = {start: [] for start in STARTS}
    after = {start: [] for start in STARTS}
    print(f"{'seed':4s}  {'start':16s} {'top1':>7s} {'cosine':>15s} {'rank of kappa':>15s}")
    for seed in range(options.seeds):
        common = [f"--config.train.seed={seed}", "--config.checkpoint.every="]
        source = folder / f"uniformer{seed}"
        accuracy = train(source, "--config.model.name=uniformer_tiny_video", *common)
        print(f"{seed:4d}  {'the UniFormer':16s} {accuracy:7.4f}")
        for start, arguments in STARTS.items():
            workdir = folder / f"{start.replace(', ', '_').replace(' ', '_')}{seed}"
            tuned = [*arguments, *common, f"--config.init_from={source}", "--config.optimizer.warmup=0 steps"]
            tuned += [f"--config.train.duration={options.steps} steps", "--config.optimizer.lr=1e-3"]
            top1[start].append(train(workdir, *tuned))
            (c0, r0), (c1, r1) = measure(workdir, source), measure(workdir)
            after[start].append(c1)
            print(
                f"{seed:4d}  {start:16s} {top1[start][-1]:7.4f} {c0:7.3f} {c1:7.3f} {r0:7.3f} {r1:7.3f}",
                flush=True,
            )
    worse = np.mean(top1["fresh"]) - np.mean(top1["delta"])
    spread = np.std([top1["fresh"], top1["delta"]], axis=1, ddof=1).max()
    print(f"delta is worse than fresh by {worse:+.4f}; largest standard deviation {spread:.4f}")
    if worse > spread or max(after["delta"]) >= 0.9:
        sys.exit(1)


if __name__ == "__main__":
    main()
