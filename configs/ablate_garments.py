"""Do D structure kernels beat one on moving garments, which have richer textures than digits?

    apt-get install dataset-fashion-mnist
    structvit ablate --config=ablate_garments

Data: clips of 4 frames of 32x32 with a garment that drifts or turns (photographs of Fashion-MNIST, moved
synthetically: 60,000 for training, 10,000 unseen ones for testing). If Fashion-MNIST is elsewhere, set
--config.data.root. The model is that of configs/ablate_digits.py on a grid of 4x8x8 positions. For each arm,
the learning rate with the best accuracy on validation clips (made of training photographs) is selected. Five
seeds are then trained and evaluated on 2000 clips of unseen garments.
"""

import ml_collections

from structvit_jax.config import default_config

_STRUCT = "model.name=deit_tiny_struct_{}_video"


# Options of `structvit ablate`; the command line overrides them.
STUDY = {
    "arms": (
        "plain attention: model.name=deit_tiny_video",
        f"ConvSA: {_STRUCT.format(1)}",
        f"D = 2: {_STRUCT.format(2)}",
        f"D = 4: {_STRUCT.format(4)}",
    ),
    "against": "ConvSA",
    "same_time": "D = 4",
    "lrs": (4e-3, 8e-3),
    "tune_seeds": 3,
    "seeds": 5,
}


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.data.name = "garment_motions"
    config.data.root = "/usr/share/datasets/fashion-mnist"
    config.data.size = 32
    config.data.frames, config.data.stride = 4, 2  # every other frame of eight
    config.data.batch_size = 32
    config.data.train_examples = 100_000
    config.data.test_examples = 2000
    config.data.mean = (0.15, 0.15, 0.15)
    config.data.std = (0.2, 0.2, 0.2)
    config.data.workers = 2  # clips are made in Python, so threads would block each other

    config.model.name = "deit_tiny_video"
    config.model.patch, config.model.num_frames, config.model.image_size = 4, 4, 32
    config.train.duration = "1600 steps"
    config.optimizer.warmup = "100 steps"
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every = "800 steps"
    config.checkpoint.keep = 1

    return config
