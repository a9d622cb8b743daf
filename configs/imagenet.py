"""StructViT on ImageNet-1K: at 224 from scratch, at 384 from weights at 224, each also with token labelling.

    structvit prepare imagenet ILSVRC --out DIR --check
    python -m structvit_jax.main --config=configs/imagenet.py:structvit_s_4_1 --config.data.root=DIR
    python -m structvit_jax.main --config=configs/imagenet.py:structvit_s_4_1,384 --config.data.root=DIR \
        --config.init_from=runs/imagenet --workdir=runs/imagenet384

The argument is MODEL,STAGE with a stage of 224, 384, 224_labels, 384_labels. The last two learn from label
maps: --config.data.label_maps=FOLDER, which structvit prepare label_maps writes with a teacher.

Needs ILSVRC 2012, 1,281,167 images to train on and 50,000 to test on, as class folders (val may be flat, with
LOC_val_solution.csv), or prepared by TFDS: --config.data.name=tfds:imagenet2012 and
--config.data.test_split=validation.
The paper's top-1: 83.2 (structvit_s_4_1), 84.2 (structvit_b_4_1); with token labelling 84.0, 85.4 and 86.0
(structvit_l_4_1), at 384 then 85.2, 86.5 and 86.7. Not run here.
Which accidents of the released programs this reproduces, and the switches, is in
structvit_jax/config/recipes.py.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(argument: str = "structvit_s_4_1") -> ml_collections.ConfigDict:
    return recipes.imagenet(*argument.split(","))
