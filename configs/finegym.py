"""StructViT on FineGym: Gym99, or Gym288 prepared as finegym288.

    structvit prepare finegym99 ANNOTATIONS VIDEOS --out DIR --check
    structvit train --config=finegym:structvit_b_4_1_video --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: annotations v1.1, the lists of categories and elements, and the whole videos; clips are cut by their
times (20,484 and 8,521 in Gym99). `structvit prepare shards` copies the clips out, which reads faster.
Starts from Kinetics-400 weights, as in the paper.
The paper's mean per-class top-1 (mean_class in result.json): 89.5 on Gym99, 54.2 on Gym288
(structvit_b_4_1_video). It does not state the test views; here they are 3 crops.
Not run here.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_b_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
