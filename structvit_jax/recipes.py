"""What the paper states of its training (section 5), as configurations that `configs/` picks from."""

from __future__ import annotations

import ml_collections

from structvit_jax.config import default_config

RANDAUGMENT_IMAGES = "rand-m9-n2-mstd0.5-inc1"  # DeiT's
RANDAUGMENT_VIDEO = "rand-m7-n4-mstd0.5-inc1"  # UniFormer's, after MViT


def images(model: str) -> ml_collections.ConfigDict:
    """ImageNet-1K from scratch: DeiT's augmentation, 300 of its epochs, batch 1024, peak rate 1e-3.

    DeiT repeats every image three times in a batch and counts an epoch as so many rows as there are images;
    an epoch here has every image, so that 100 of them are its 300.
    """
    config = _both(model)
    config.data.frames = 0
    config.data.crop_fraction = 224 / 256
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.batch_size = 1024
    config.augment.randaugment = RANDAUGMENT_IMAGES
    config.augment.flip = 0.5
    config.augment.repeats = 3
    config.train.duration = "100 epochs"
    config.optimizer.lr = 1e-3
    config.optimizer.warmup = "1.6667 epochs"  # five of DeiT's
    config.optimizer.end_lr = 1e-5
    config.eval.every = "5 epochs"
    return config


def dense_video(model: str) -> ml_collections.ConfigDict:
    """Kinetics: dense sampling, mirrored clips, 110 epochs of 64 clips a step, each augmented twice."""
    config = _video(model)
    config.data.sampling = "dense"
    config.data.stride = 4
    config.data.test_clips = 4
    config.augment.flip = 0.5
    config.train.duration = "110 epochs"
    config.optimizer.warmup = "10 epochs"
    return config


def segment_video(model: str) -> ml_collections.ConfigDict:
    """Something-Something, Diving-48 and FineGym: one frame per segment, no mirroring, 60 epochs; B with
    random crops as its only augmentation."""
    config = _video(model)
    if "_b_" in model:
        config.augment.randaugment = ""
        config.augment.erase = config.augment.mixup = config.augment.cutmix = 0.0
    config.data.sampling = "segment"
    config.data.test_crops = 3
    config.train.duration = "60 epochs"
    config.optimizer.warmup = "5 epochs"
    return config


def _video(model: str) -> ml_collections.ConfigDict:
    config = _both(model)
    config.data.frames = 32 if "_b_" in model else 16
    config.data.mean = (0.45, 0.45, 0.45)
    config.data.std = (0.225, 0.225, 0.225)
    config.data.batch_size = 128  # 64 clips, each twice
    config.augment.randaugment = RANDAUGMENT_VIDEO
    config.augment.repeats = 2
    config.optimizer.lr = 2e-4
    config.eval.every = "10 epochs"
    return config


def _both(model: str) -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = model
    config.data.name = "folder"
    config.data.size = 224
    config.data.workers = 8
    config.augment.crop_area = (0.08, 1.0)
    config.augment.crop_aspect = (3 / 4, 4 / 3)
    config.augment.erase = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.train.label_smoothing = 0.1
    config.eval.batch_size = 64
    return config
