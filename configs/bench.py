"""A model at full size on random pixels, to measure its speed. It needs no data.

    structvit bench model --config=bench:structvit_s_4_1 --peer=torch
    structvit bench model --config=bench:structvit_s_4_1_video

The argument is the name of the model. A batch is eight images of 224x224, or one clip of 16 such frames,
without augmentation. Set --config.model.dtype=bfloat16 for half precision, --config.data.batch_size for
larger batches, and --config.data.size and --config.data.frames for other input sizes.

Measured: train steps at 3.35 images/s and 0.200 clips/s on two cores of an AMD EPYC (float32, JAX 0.10.2,
27 November 2026). docs/speed.md has all measurements.
"""

import ml_collections

from structvit_jax.config import default_config


def get_config(argument: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    config = default_config()
    video = argument.endswith("_video")
    config.model.name = argument
    config.data.name = "noise:400" if video else "noise:1000"
    config.data.size = 224
    config.data.frames = 16 if video else 0
    config.data.batch_size = config.eval.batch_size = 1 if video else 8
    config.data.train_examples = config.data.test_examples = 64
    return config
