"""The training recipes of the paper (section 5), for the files in `configs/`.

Where the paper refers to DeiT, MViT or UniFormer, the values are those of their released code. Some of them
are quirks of that code. The recipes reproduce these quirks; to undo one, set the keys after its colon:

- Images: the learning rate changes once per epoch, one epoch late, and the cosine includes the warm-up:
  `optimizer.lr_update_every=`, `optimizer.lr_update_delay=0`, `optimizer.schedule_origin=warmup`.
- Images: an epoch of DeiT has a third of the images, three times each:
  `augment.repeated_augmentation=1`, `train.duration='300 epochs'`, `optimizer.warmup='5 epochs'`.
- Images: colour jitter is configured but never applied: `augment.color_jitter=0.4`.
- Video: each clip is augmented twice, so a batch has twice as many clips as stated:
  `augment.repeated_augmentation=1`, `data.batch_size=64`.

The recipes do not reproduce one quirk: UniFormer's release for Something-Something trains on BGR frames. To
do the same, set `data.channels=bgr`.
"""

from __future__ import annotations

import ml_collections

from structvit_jax.config import default_config
from structvit_jax.utils.errors import check_choice

RANDAUGMENT_IMAGES = "rand-m9-n2-mstd0.5-inc1"  # DeiT's
RANDAUGMENT_VIDEO = "rand-m7-n4-mstd0.5-inc1"  # UniFormer's, after MViT


def imagenet(model: str, stage: str = "224") -> ml_collections.ConfigDict:
    """Return the recipe of a stage: "224", "384", "224_labels" or "384_labels" (with token labelling).

    Training at 384 starts from weights at 224 and takes 60 epochs at a learning rate of 5e-6 in batches of
    512 (L: 256), as in UniFormer. The paper does this only with token labelling. The stage "384" has the same
    values, but the augmentation of `images`.

    Raises:
      UserError: an unknown stage.
    """
    check_choice("stage", stage, ("224", "384", "224_labels", "384_labels"))
    labels = stage.endswith("_labels")
    config = token_labels(model) if labels else images(model)
    if stage.startswith("384"):
        config.init_from = None  # the user sets it to weights trained at 224
        config.data.size = 384
        config.data.crop_fraction = 0.9 if labels else 1.0
        config.data.batch_size = 256 if "_l_" in model else 512
        config.augment.repeated_augmentation = 1
        config.train.duration = "60 epochs"
        config.optimizer.lr = config.optimizer.end_lr = 5e-6
        config.optimizer.lr_update_every = ""
        config.optimizer.lr_update_delay = 0
        config.optimizer.warmup = config.optimizer.cooldown = "0 steps"
        config.optimizer.weight_decay = 1e-8
        config.optimizer.ema = 0.0
    return config


def images(model: str) -> ml_collections.ConfigDict:
    """Return DeiT's recipe for ImageNet-1K from scratch: 300 epochs in batches of 1024.

    DeiT repeats each image three times in a batch and counts an epoch when it has seen as many rows as there
    are images. An epoch here contains every image, so 100 epochs here are 300 epochs of DeiT.
    """
    config = _images(model)
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.repeated_augmentation = 3
    config.train.duration = "100 epochs"
    config.optimizer.lr = 1e-3
    config.optimizer.warmup = "1.66667 epochs"  # five epochs of DeiT
    config.optimizer.end_lr = 1e-5
    config.optimizer.lr_update_every = "0.333333 epochs"  # one epoch of DeiT
    config.optimizer.lr_update_delay = 1
    config.optimizer.schedule_origin = "start"
    return config


def token_labels(model: str) -> ml_collections.ConfigDict:
    """Return UniFormer's recipe for ImageNet-1K with token labelling.

    Training takes 310 epochs in batches of 1024, the last ten at the final learning rate. MixToken replaces
    mixup and CutMix, and the moving average of the weights is evaluated. The user has to set
    config.data.label_maps.
    """
    config = _images(model)
    config.model.token_labels = True
    config.data.crop_fraction = 0.9
    config.augment.mix_token = 1.0
    config.train.duration = "310 epochs"
    config.optimizer.lr = 1.2e-3 if "_l_" in model else 1.6e-3
    config.optimizer.warmup = "5 epochs"
    config.optimizer.end_lr = 1e-5
    config.optimizer.cooldown = "10 epochs"
    config.optimizer.lr_update_every = "1 epochs"
    config.optimizer.schedule_origin = "start"
    config.optimizer.ema = 0.99992
    return config


def dense_video(model: str) -> ml_collections.ConfigDict:
    """Return the recipe for Kinetics from ImageNet weights.

    It uses dense sampling, horizontal flips, 110 epochs, and 64 clips per step, each augmented twice.
    """
    config = _video(model)
    config.init_from = None  # the user sets it to ImageNet weights
    config.data.sampling = "dense"
    config.data.stride = 4
    config.data.test_clips = 4
    config.augment.flip = 0.5
    config.train.duration = "110 epochs"
    config.optimizer.warmup = "10 epochs"
    return config


def segment_video(model: str) -> ml_collections.ConfigDict:
    """Return the recipe for Something-Something, Diving-48 and FineGym from Kinetics-400 weights.

    It uses one frame per segment, no flips, and 60 epochs. For B, random crops are the only augmentation.
    """
    config = _video(model)
    config.init_from = None  # the user sets it to Kinetics-400 weights
    if "_b_" in model:
        _crops_only(config)
    config.data.sampling = "segment"
    config.data.test_crops = 3
    config.train.duration = "60 epochs"
    config.optimizer.warmup = "5 epochs"
    return config


def ablation_video(model: str) -> ml_collections.ConfigDict:
    """Return the recipe of the ablations on Something-Something V1, from ImageNet weights.

    Clips have 16 frames; random crops are the only augmentation.
    """
    config = segment_video(model)
    _crops_only(config)
    return config


def _crops_only(config: ml_collections.ConfigDict) -> None:
    config.augment.randaugment = ""
    config.augment.erase = config.augment.mixup = config.augment.cutmix = 0.0


def _images(model: str) -> ml_collections.ConfigDict:
    config = _common(model)
    config.data.frames = 0
    config.data.crop_fraction = 224 / 256
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.batch_size = 1024
    config.augment.randaugment = RANDAUGMENT_IMAGES
    config.augment.crop_aspect = (3 / 4, 4 / 3)
    config.augment.flip = 0.5
    config.eval.every = "5 epochs"
    return config


def _video(model: str) -> ml_collections.ConfigDict:
    config = _common(model)
    config.data.frames = 32 if "_b_" in model else 16
    config.data.mean = (0.45, 0.45, 0.45)
    config.data.std = (0.225, 0.225, 0.225)
    config.data.batch_size = 128  # 64 clips, each augmented twice
    config.augment.randaugment = RANDAUGMENT_VIDEO
    config.augment.crop_aspect = (0.75, 1.3333)  # UniFormer's
    config.augment.repeated_augmentation = 2
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optimizer.lr = 2e-4
    config.optimizer.clip_norm = 20.0  # UniFormer's
    config.eval.every = "10 epochs"
    return config


def _common(model: str) -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = model
    config.data.name = "folder"
    config.data.size = 224
    config.augment.crop_area = (0.08, 1.0)
    config.augment.erase = 0.25
    config.train.label_smoothing = 0.1
    config.eval.batch_size = 64
    return config
