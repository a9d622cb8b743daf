"""StructViT on ImageNet-1K, at 224 from scratch and at 384 from weights trained at 224.

    structvit prepare imagenet ILSVRC --out=DIR --check
    structvit train --config=imagenet:structvit_s_4_1 --config.data.root=DIR
    structvit train --config=imagenet:structvit_s_4_1,384 --config.data.root=DIR \
        --config.init_from=runs/imagenet --workdir=runs/imagenet384

The argument is MODEL,STAGE, where STAGE is 224 (the default), 384, 224_labels or 384_labels. The last two use
token labelling: set --config.data.label_maps to a folder of label maps, which `structvit prepare label_maps`
writes with a teacher.

Data: ILSVRC 2012, 1,281,167 images for training and 50,000 for testing, as class folders (val may be flat,
with LOC_val_solution.csv), or prepared by TFDS: --config.data.name=tfds:imagenet2012 and
--config.data.test_split=validation.
The paper reports this top-1:

                          structvit_s_4_1  structvit_b_4_1  structvit_l_4_1
    224                              83.2             84.2
    224, token labelling             84.0             85.4             86.0
    384, token labelling             85.2             86.5             86.7

This configuration has not been trained here.
The recipe reproduces some quirks of the released code. structvit_jax/config/recipes.py lists them and the
keys that undo them.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(argument: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    return recipes.imagenet(*argument.split(","))
