"""Your own videos or images: from scratch, or from existing weights.

    structvit prepare folder DIR --check
    structvit train --config=folder --config.data.root=DIR
    structvit train --config=folder:structvit_s_4_1_video,finetune --config.data.root=DIR \
        --config.init_from=RUN_OR_FILE

Data: DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, or lists DIR/train.csv and DIR/val.csv
(path,label[,start,end]), or DIR/CLASS/FILE. If there is no test split, a tenth of the examples is held out
for testing. docs/your-data.md describes all layouts.

The argument is MODEL,STAGE: a model such as structvit_s_4_1, and scratch (the default) or finetune. Keys that
are left open are set to values that fit the data (structvit_jax/config/automatic.py) and printed in one line:
a small StructViT for videos or images, depending on the kind of most files; the input size; the batch; the
random crops; the learning rate; and a duration of 30 epochs, but at least 12,000 clips or 50,000 images, and
at most 160,000 clips or 2,000,000 images. Any key can be set on the command line, for example
--config.train.duration="10 epochs". Nothing is flipped, because left and right may be different classes. If
they are not, try --config.augment.flip=0.5.

Measured in a test: top-1 of at least 0.9 on 150 unseen video files after 100 steps of 16 clips of 24x24, from
180 files of three classes, on two cores of an AMD EPYC (float32, JAX 0.10.2, November 2026).

The learning rate and the crops were chosen by these runs, one per row (same machine). Both are much shorter
than the default duration, so the top-1 is below what it reaches.

- Videos: 204 generated clips of textures that move left, right, closer, away, or turn either way, with noise
  and at varied speeds, from 320x240; 300 steps of 16 clips of 8x32x32; 180 test clips.
- Images: 10,000 images of Fashion-MNIST; 500 steps of 128; 5,000 test images.

    learning rate   crops        top-1, videos   top-1, images
    1e-3            0.5 to 1     0.661           0.801
    2e-3            0.5 to 1     0.917           0.821
    3e-3            0.5 to 1     0.956
    4e-3            0.5 to 1                     0.836
    5e-3            0.5 to 1     0.928
    3e-3            0.7 to 1     0.833           0.856
    2e-3, flips     0.5 to 1                     0.810
    2e-3, flips     0.7 to 1                     0.837

With the chosen values, all 60,000 images of Fashion-MNIST give top-1 0.899 on the 10,000 test images after
1,953 steps of 128, a seventh of the default duration (one run).
"""

import ml_collections

from structvit_jax.config import default_config
from structvit_jax.config.automatic import OPEN, leave_open
from structvit_jax.utils.errors import check_choice


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    model, _, stage = argument.partition(",")
    finetune = check_choice("stage", stage or "scratch", ("scratch", "finetune")) == "finetune"
    config = default_config()
    leave_open(config, *OPEN)
    if model:
        config.model.name = model

    config.data.name = "folder"
    config.data.val_fraction = 0.1
    config.data.sampling = "segment"  # over the whole clip, whatever its length
    config.augment.crop_aspect = (0.75, 1.3333)

    config.train.label_smoothing = 0.1
    config.eval.batch_size = 32
    if not finetune:
        config.data.mean = (0.45, 0.45, 0.45)
        config.data.std = (0.225, 0.225, 0.225)
    else:  # mean, std and channels are those of the weights
        config.init_from = None  # the user sets it
        if model and "tiny" not in model:
            config.data.size = 224
        config.data.batch_size = 16
        config.model.drop_path = 0.2  # more than for large data sets, like UniFormer on Something-Something
        config.train.grad_accum_steps = 2  # 8 clips at a time: 14 GB for structvit_s_4_1_video (estimated)
        config.optimizer.lr = 1e-4  # UniFormer's rule: 2e-4 for 32 clips
        config.optimizer.layer_decay = 0.85
        config.optimizer.clip_norm = 20.0
        config.checkpoint.keep_best = 1
    return config
