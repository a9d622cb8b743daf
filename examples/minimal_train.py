"""Train a StructViT on clips with a plain loop: a model, optax, and one jitted step.

    python examples/minimal_train.py
    python examples/minimal_train.py --steps=200 --batch=64 --model=deit_tiny_struct_4_video

To try an idea, replace the data, the loss or the model below. For checkpoints, resuming, several devices or
data on disk, use `structvit train` instead.

The clips show a handwritten digit that drifts in one of eight directions (real scans, moved synthetically).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import structvit_jax
from structvit_jax.data.digits import MovingDigits

MEAN, STD = 0.08, 0.16  # of pixels from 0 to 1
Step = Callable[..., tuple[nnx.State, nnx.State, optax.OptState, jax.Array]]


def load(source: MovingDigits, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return clips, uint8 [batch, time, height, width, 3], and labels, int32 [batch]."""
    decoded, labels = zip(*(source.open(int(i)) for i in indices), strict=True)
    return np.stack([clip.frames(range(clip.count)) for clip in decoded]), np.array(labels, np.int32)


def batches(source: MovingDigits, size: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield one random batch per step."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield load(source, rng.integers(len(source), size=size))


def normalize(clips: jax.Array) -> jax.Array:
    return (clips.astype(jnp.float32) / 255 - MEAN) / STD


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Step:
    """Return the train step. Its argument `stats` has the running statistics of BatchNorm."""

    def loss_fn(params, stats, clips, labels, key):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(normalize(clips), key=key)  # the key is for stochastic depth
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.BatchStat)

    @jax.jit
    def step(params, stats, opt_state, clips, labels, key):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, clips, labels, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    return step


def accuracy(model: nnx.Module, source: MovingDigits, batch: int) -> float:
    """Return the top-1 accuracy on all clips. Their number should be a multiple of the batch size."""
    model.eval()
    graphdef, state = nnx.split(model)
    predict = jax.jit(lambda clips: nnx.merge(graphdef, state)(normalize(clips)).argmax(axis=-1))
    right = 0
    for start in range(0, len(source), batch):
        clips, labels = load(source, np.arange(start, start + batch))
        right += int((np.asarray(predict(clips)) == labels).sum())
    return right / len(source)


def train(name: str, steps: int, batch: int, lr: float, test_clips: int, **overrides: object) -> float:
    """Train a model, print the progress, and return the top-1 accuracy on test clips.

    Args:
      name: name of a model, see `structvit_jax.list_models`.
      steps: number of train steps.
      batch: batch size.
      lr: peak learning rate.
      test_clips: number of test clips, a multiple of the batch size.
      overrides: fields of `structvit_jax.models.Variant`, such as depths=(1, 1, 1, 1).
    """
    source = MovingDigits("train", steps * batch, seed=0)
    classes = len(source.class_names)
    model = structvit_jax.create_model(name, num_classes=classes, **overrides)
    model.train()  # use batch statistics in BatchNorm, and enable stochastic depth
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps)
    # Weight decay is for matrices and kernels only, not for vectors (biases and the scales of norms).
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer = optax.adamw(schedule, weight_decay=0.05, mask=mask)
    opt_state = optimizer.init(params)

    step, key, start = make_step(graphdef, optimizer), jax.random.key(0), time.perf_counter()
    for i, (clips, labels) in enumerate(batches(source, batch, steps)):
        key_i = jax.random.fold_in(key, i)
        params, stats, opt_state, loss = step(params, stats, opt_state, clips, labels, key_i)
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i + 1}/{steps}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    return accuracy(nnx.merge(graphdef, params, stats), MovingDigits("test", test_clips, seed=0), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a StructViT on moving digits with a plain loop.")
    parser.add_argument("--model", default="structvit_tiny_4_1_video")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    top1 = train(args.model, args.steps, args.batch, args.lr, test_clips=32 * args.batch)
    print(f"top-1 on {32 * args.batch} unseen clips: {top1:.3f}")


if __name__ == "__main__":
    main()
