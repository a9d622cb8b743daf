"""StructViT on FineGym: Gym99, or Gym288 if prepared with finegym288.

    structvit prepare finegym99 ANNOTATIONS VIDEOS --out=DIR --check
    structvit train --config=finegym:structvit_b_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: the annotations v1.1, the lists of categories and elements, and the whole videos. Clips are parts of
these videos (Gym99: 26,320 for training and 8,521 for testing; Gym288: 29,334 and 9,646). `structvit prepare
shards` stores each clip separately, so that reading is faster.
Initial weights: Kinetics-400 weights, as in the paper: a run of configs/kinetics400.py or a released file.
The paper: mean per-class top-1 (mean_class in result.json) 89.5 on Gym99 and 54.2 on Gym288
(structvit_b_4_1_video). It does not state the test views; here they are three crops.
This configuration has not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_b_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
