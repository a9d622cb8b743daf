"""StructViT on ImageNet-1K: at 224 from scratch, at 384 from weights at 224; each also with token labelling.

    structvit prepare imagenet ILSVRC --out=DIR --check
    structvit train --config=imagenet:structvit_s_4_1 --config.data.root=DIR
    structvit train --config=imagenet:structvit_s_4_1,384 --config.data.root=DIR \
        --config.init_from=runs/imagenet --workdir=runs/imagenet384

The argument is MODEL,STAGE with a stage of 224, 384, 224_labels or 384_labels. The last two train on label
maps, which `structvit prepare label_maps` writes with a teacher: --config.data.label_maps=FOLDER.

Data: ILSVRC 2012, 1,281,167 images for training and 50,000 for testing, as class folders (val may be flat,
with LOC_val_solution.csv), or prepared by TFDS: --config.data.name=tfds:imagenet2012 and
--config.data.test_split=validation.
The paper: top-1 83.2 (structvit_s_4_1) and 84.2 (structvit_b_4_1); with token labelling 84.0, 85.4 and 86.0
(structvit_l_4_1), then at 384 85.2, 86.5 and 86.7.
Not run here on these data.
The recipe reproduces some accidents of the released code. structvit_jax/config/recipes.py lists them, and the
keys that undo them.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(argument: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    return recipes.imagenet(*argument.split(","))
