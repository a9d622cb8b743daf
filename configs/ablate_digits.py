"""A miniature of the paper's tables 1 and 6: do D structure kernels beat one?

    structvit ablate --config=ablate_digits

Data: clips of 4 frames of 24x24 with a digit that drifts or rotates (real scans, moved synthetically; they
come with scikit-learn). The model is a transformer of two blocks on a grid of 4x6x6 positions; each arm
replaces its attention. For each arm, the learning rate with the best accuracy on validation clips (made of
training scans) is selected. Five seeds are then trained and evaluated on 2000 clips of held-out scans.
Measured: 151 runs in 2.4 hours on two cores of an AMD EPYC (float32, JAX 0.10.2, November 2026); the results
are in docs/ablations.md.
"""

import ml_collections

from structvit_jax.config import default_config

_STRUCT = "model.name=deit_tiny_struct_{}_video"
_SHARED = "model.key_kernels=shared model.value_kernels=shared"


# Options of `structvit ablate`; the command line overrides them.
STUDY = {
    "arms": (
        "plain attention: model.name=deit_tiny_video",
        f"ConvSA: {_STRUCT.format(1)}",
        f"ConvSA, shared kernels: {_STRUCT.format(1)} {_SHARED}",
        f"D = 2: {_STRUCT.format(2)}",
        f"D = 4: {_STRUCT.format(4)}",
        f"D = 8: {_STRUCT.format(8)}",
        f"D = 4, element: {_STRUCT.format(4)} model.aggregation=element",
        f"D = 4, shared kernels: {_STRUCT.format(4)} {_SHARED}",
        f"D = 4, window of one: {_STRUCT.format(4)} model.key_window=1 model.value_window=1",
    ),
    "against": "ConvSA",
    "same_time": "D = 4",
    "lrs": (2e-3, 4e-3, 8e-3),  # docs/ablations.md explains why not 1.6e-2
    "tune_seeds": 3,
    "seeds": 5,
}


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.data.name = "digit_motions"
    config.data.frames, config.data.stride = 4, 2  # every other frame of eight
    config.data.batch_size = 32
    config.data.train_examples = 100_000
    config.data.test_examples = 2000
    config.data.mean = (0.15, 0.15, 0.15)
    config.data.std = (0.2, 0.2, 0.2)
    config.data.workers = 2  # clips are made in Python, so threads would block each other

    config.model.name = "deit_tiny_video"
    config.model.patch, config.model.num_frames = 4, 4
    config.train.duration = "800 steps"
    config.optimizer.warmup = "100 steps"
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every = "400 steps"
    config.checkpoint.keep = 1

    return config
