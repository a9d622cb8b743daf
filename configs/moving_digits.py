"""StructViT on moving digits: which way does a handwritten digit drift?

    python -m structvit_jax.main --config=configs/moving_digits.py

Real scans moved synthetically, 8 directions, nothing to download. About two minutes on two CPU cores;
see the README for the accuracy measured.
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
