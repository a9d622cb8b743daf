"""StructViT on images of handwritten digits.

    structvit train --config=digits

Data: real scans of digits that come with scikit-learn, 1437 for training and 360 for testing.
Measured: top-1 0.972 on the 360 scans after 449 steps of 64 images, in 53 s on two cores of an AMD EPYC
(float32, Python 3.11, JAX 0.10.2, November 2026; one run).
"""

import ml_collections

from structvit_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "structvit_tiny_4_1"

    config.data.name = "digits"
    config.data.frames = 0
    config.data.size = 32
    config.data.batch_size = 64
    config.augment.crop_area = (0.7, 1.0)
    config.augment.crop_aspect = (0.8, 1.25)
    config.data.mean = (0.3, 0.3, 0.3)
    config.data.std = (0.32, 0.32, 0.32)

    config.train.duration = "20 epochs"
    config.optimizer.lr = 3e-3
    config.optimizer.warmup = "2 epochs"
    config.eval.every = "5 epochs"
    config.checkpoint.every = "5 epochs"
    return config
