"""Your own videos or images: from scratch, or from weights that are there.

    python -m structvit_jax.main --config=configs/folder.py --config.data.root=DIR
    python -m structvit_jax.main --config=configs/folder.py:structvit_s_4_1_video,finetune \
        --config.data.root=DIR --config.init_from=FILE_OR_RUN

DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, or lists DIR/train.csv and DIR/val.csv (path,label[,start,end]);
see the README. The argument is MODEL,STAGE: another model, also one for images (structvit_tiny_4_1), and
scratch or finetune. Without it a small StructViT for videos, that a CPU can train from scratch.
Flipping is off, since left and right may be classes; where they are not, try --config.augment.flip=0.5.
"""

import ml_collections

from structvit_jax.config import default_config
from structvit_jax.errors import known


def get_config(argument: str = "structvit_tiny_4_1_video") -> ml_collections.ConfigDict:
    model, _, stage = argument.partition(",")
    finetune = known("stage", stage or "scratch", ("scratch", "finetune")) == "finetune"
    config = default_config()
    config.model.name = model

    config.data.name = "folder"
    config.data.sampling = "segment"  # over the whole clip, however long
    config.data.size = 64 if "tiny" in model else 224
    if model.endswith("_video"):
        config.data.frames = 8 if "tiny" in model else 16
        config.data.short_side = 256
    else:
        config.data.frames = 0
    config.data.batch_size = 16
    config.augment.crop_area = (0.5, 1.0)
    config.augment.crop_aspect = (0.75, 1.3333)

    config.train.duration = "30 epochs"
    config.train.label_smoothing = 0.1
    config.optimizer.lr = 1e-3
    config.optimizer.warmup = "2 epochs"
    config.eval.every = "5 epochs"
    config.eval.batch_size = 32
    config.checkpoint.every = "1 epochs"
    if not finetune:
        config.data.mean = (0.45, 0.45, 0.45)
        config.data.std = (0.225, 0.225, 0.225)
    else:  # as the weights were trained
        config.init_from = "<weights of your choice>"
        config.model.drop_path = 0.2  # more than for large data, as UniFormer's on Something-Something
        config.train.duration = "20 epochs"
        config.train.accumulate = 2  # eight clips at a time: 14 GB for structvit_s_4_1_video, by --mode=plan
        config.optimizer.lr = 1e-4  # UniFormer's rule, 2e-4 for 32 clips
        config.optimizer.layer_decay = 0.85
        config.optimizer.clip_norm = 20.0
        config.checkpoint.keep_best = 1
    return config
