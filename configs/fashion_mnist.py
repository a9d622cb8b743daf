"""StructViT and its baselines on Fashion-MNIST: photographs of garments, 28x28 pixels, 10 classes.

    apt-get install dataset-fashion-mnist
    structvit train --config=fashion_mnist
    structvit train --config=fashion_mnist:uniformer
    structvit ablate --config=fashion_mnist
"""

import ml_collections

from structvit_jax.config import default_config
from structvit_jax.utils.errors import check_choice

ARMS = {
    "structvit": "structvit_tiny_4_1",
    "convsa": "structvit_tiny_1_1",
    "uniformer": "uniformer_tiny",
    "attention": "deit_tiny",
}


def get_config(arm: str = "structvit") -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = ARMS[check_choice("arm", arm or "structvit", ARMS)]
    if arm == "attention":
        config.model.patch, config.model.image_size = 4, 28
    config.data.name = "folder"
    config.data.root = "/usr/share/datasets/fashion-mnist"
    config.data.frames = 0
    config.data.size = 28
    config.data.batch_size = 128
    config.data.mean = (0.286, 0.286, 0.286)
    config.data.std = (0.353, 0.353, 0.353)
    config.augment.crop_area = (0.7, 1.0)
    config.augment.crop_aspect = (0.8, 1.25)
    config.augment.flip = 0.5
    config.train.duration = "20 epochs"
    config.train.label_smoothing = 0.1
    config.optimizer.lr = 3e-3
    config.optimizer.warmup = "1 epochs"
    config.checkpoint.every = "1 epochs"
    return config
