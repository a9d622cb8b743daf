"""StructViT on FineGym: Gym99, or Gym288 prepared as finegym288.

    structvit prepare finegym99 ANNOTATIONS VIDEOS --out DIR --check
    python -m structvit_jax.main --config=configs/finegym.py:structvit_b_4_1_video --config.data.root=DIR

Needs the annotations v1.1, the category and element lists, and the whole videos; clips are cut out of them by
their times (20,484 and 8,521 in Gym99). `structvit_jax.data.shards` copies the parts out, which reads faster.
The paper's mean per-class top-1 (mean_class in result.json): 89.5 on Gym99, 54.2 on Gym288
(structvit_b_4_1_video); its test views are not stated, 3 crops here.
Not run here. Starts from Kinetics-400 weights, as the paper: --config.init_from=RUN_OR_FILE.
"""

import ml_collections

from structvit_jax.config import recipes


def get_config(model: str = "structvit_b_4_1_video") -> ml_collections.ConfigDict:
    return recipes.segment_video(model)
