"""StructViT on ImageNet-1K, from scratch.

    python -m structvit_jax.data.prepare imagenet ILSVRC --out DIR --check
    python -m structvit_jax.main --config=configs/imagenet.py:structvit_s_4_1 --config.data.root=DIR

Needs ILSVRC 2012, 1,281,167 images to train on and 50,000 to test on, as class folders (val may be flat, with
LOC_val_solution.csv), or prepared by TFDS: --config.data.name=tfds:imagenet2012 and
--config.data.test_split=validation.
The paper's top-1: 83.2 (structvit_s_4_1), 84.2 (structvit_b_4_1). Not run here.
"""

import ml_collections

from structvit_jax import recipes


def get_config(model: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    return recipes.images(model)
