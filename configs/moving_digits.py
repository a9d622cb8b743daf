"""StructViT on moving digits: in which of 8 directions does a handwritten digit drift?

    structvit train --config=moving_digits

Data: real scans of digits, moved synthetically; they come with scikit-learn.
Measured: top-1 1.000 on 2048 unseen clips after 200 steps of 64 clips, in 149 s including installation, on
two cores of an AMD EPYC (float32, Python 3.11, JAX 0.10.2, November 2026; one run).
"""

import ml_collections

from structvit_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "structvit_tiny_4_1_video"

    config.data.name = "moving_digits"
    config.data.batch_size = 64
    config.data.train_examples = 12800
    config.data.test_examples = 2048
    config.data.mean = (0.08, 0.08, 0.08)
    config.data.std = (0.16, 0.16, 0.16)

    config.train.duration = "1 epochs"
    config.optimizer.lr = 3e-3
    config.optimizer.warmup = "0.1 epochs"
    config.checkpoint.every = "50 steps"
    return config
