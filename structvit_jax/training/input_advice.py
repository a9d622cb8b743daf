"""Advice for runs whose steps wait for data: which stage of reading dominates, and what to change."""

from __future__ import annotations

import math

import ml_collections

from structvit_jax.config.automatic import SHORT_SIDE_RATIO
from structvit_jax.data.pipeline import worker_count
from structvit_jax.data.types import DataOptions
from structvit_jax.runtime.goodput import DataWait
from structvit_jax.utils.cores import available_cores

# The stages of `structvit_jax.data.stages` in words.
_STAGES = {
    "open": "opening examples",
    "decode": "decoding",
    "convert": "converting frames to RGB",
    "augment": "RandAugment and colour jitter",
    "crop": "cropping and resizing",
    "batch": "copying examples into batches",
}


def advise(wait: DataWait, config: ml_collections.ConfigDict) -> str:
    """Return one line with the wait for data, the stage that takes the most time, and what to change."""
    workers, cores = worker_count(DataOptions.from_config(config.data)), available_cores()
    if max(workers, 1) < cores:
        change = (
            f"try --config.data.workers={cores} (now {workers or 'threads'}; {cores} CPU cores available)"
        )
    else:
        remedies = "".join(f"{remedy}, or " for remedy in _remedies(wait.stage, config))
        change = f"all CPU cores ({cores}) are in use; try {remedies}a machine with more cores"
    return (
        f"note: steps waited for data {wait.fraction:.0%} of the last minute; reading spends most of its time"
        f" ({wait.stage_fraction:.0%}) on {_STAGES[wait.stage]}; {change}"
    )


def _remedies(stage: str, config: ml_collections.ConfigDict) -> list[str]:
    """Return what makes a stage faster with the same number of cores."""
    data, augment = config.data, config.augment
    if stage == "augment":
        key = "randaugment" if augment.randaugment else "color_jitter"
        fewer = "fewer RandAugment operations" if augment.randaugment else "less colour jitter"
        return [f"{fewer} (--config.augment.{key}, now {augment[key]})"]
    if data.name != "folder" or stage == "batch":
        return []
    if stage == "crop":
        side = math.ceil(SHORT_SIDE_RATIO * data.size)
        return [f"--config.data.short_side={side}"] if not 0 < data.short_side <= side else []
    cached = "--config.data.cache=on if the decoded data fit in memory"
    if not data.frames:
        return [cached]
    smaller = f"smaller copies of the videos (structvit prepare folder {data.root} --transcode=256 --out=DIR)"
    return [smaller, cached]
