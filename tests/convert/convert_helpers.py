"""Weights for the tests of conversion."""

import functools
import json
import zlib

import jax
import numpy as np
import torch
from conftest import ROOT

from structvit_jax import convert, create_model
from structvit_jax.models import get_variant, weights

PARITY = ROOT / "tests" / "fixtures" / "parity"  # its README says where the vectors are from
# Sizes of small models of every released kind.
SMALL = {"depths": (1, 1, 2, 1), "widths": (8, 8, 32, 64), "head_width": 32}


@functools.cache
def state_dict(kind):
    """Return the deterministic weights with which the parity vectors were computed."""
    shapes = json.loads((PARITY / f"uniformer_s_{kind}_keys.json").read_text())
    return {key: _weight(key, shape) for key, shape in shapes.items()}


def _weight(key, shape):
    z = np.random.default_rng(zlib.crc32(key.encode("utf-8"))).standard_normal(shape)
    if key.endswith("num_batches_tracked"):
        return np.int64(0)
    if key.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif key.endswith(("running_mean", ".bias")):
        z = 0.1 * z
    elif z.ndim == 1:
        z = 1 + 0.1 * z
    else:
        gain = 2.0 if key.endswith("attn.qkv.weight") else 0.5 if key.endswith("pos_embed.weight") else 1.0
        z = z * gain / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def relative(actual, expected):
    """Return the largest difference, relative to the largest expected value."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def call(model, x):
    """Return the logits of a model, compiled as one function."""
    structure, arrays = weights.split(model)
    return np.asarray(jax.jit(lambda arrays, x: structure.model(arrays)(x))(arrays, x))


def random_model(name, seed=0, **overrides):
    """Return a small model with random parameters and statistics, and these arrays."""
    model = create_model(name, num_classes=5, seed=None, **(SMALL | overrides))
    rng = np.random.default_rng(seed)
    params, stats = weights.split(model)[1]
    arrays = {n: rng.normal(0, 0.3, a.shape).astype(np.float32) for n, a in (params | stats).items()}
    arrays |= {n: 1 + 0.1 * np.abs(a) for n, a in arrays.items() if n.endswith((".scale", ".var"))}
    weights.update(model, weights.cast_like(weights.Weights(params, stats), arrays))
    return model, arrays


def zeros(name, classes, **overrides):
    """Return a state dict of zeros for a model."""
    model = create_model(name, num_classes=classes, seed=None, **overrides)
    params, stats = weights.split(model)[1]
    return convert.to_torch({n: np.zeros(a.shape, np.float32) for n, a in (params | stats).items()})


def tiny(name, classes=1000, seed=0):
    """Return a state dict of random numbers for a tiny model."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal(array.shape).astype(array.dtype) if array.ndim else array
        for key, array in zeros(name, classes).items()
    }


def as_tensors(arrays):
    return {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}


def write_pth(path, content):
    torch.save(content, path)
    return str(path)


def as_source(name, arrays, class_names=None, **overrides):
    """Return the arrays of a small model as a source of weights."""
    model = {"name": name, **SMALL, **overrides}
    return convert.Source(arrays, get_variant(**model), model, 5, class_names, None, "there")


def fit(source, name, class_names=None, rules=None, num_classes=5, **overrides):
    """Fit weights to a small model; return it and the result."""
    model = create_model(name, num_classes=num_classes, **(SMALL | overrides))
    own = weights.split(model)[1]
    fitted = convert.adapt(
        source, own.params | own.batch_stats, model.variant, class_names, rules or convert.Rules()
    )
    weights.update(model, weights.cast_like(own, fitted.arrays))
    return model, fitted
