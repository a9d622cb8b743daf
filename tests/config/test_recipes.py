"""Every recipe of the paper, with a tiny model on random data of the right shapes.

Each trains, evaluates, saves and resumes, from the kind of weights that the paper starts from.
"""

import os

import numpy as np
import pytest
from conftest import records
from small import SHORT, SMALL

from structvit_jax.config import recipes
from structvit_jax.data.label_maps import LabelMapWriter, digest

TINY = [
    *SHORT,
    "--config.data.name=noise:4",
    "--config.data.size=24",
    "--config.data.workers=0",
    "--config.data.batch_size=4",
    "--config.optimizer.cooldown=0 steps",
    "--config.checkpoint.every=1 steps",
]
# The other tests take minutes: EVERY_RECIPE=1 python -m pytest tests/config/test_recipes.py
every = pytest.mark.skipif(not os.environ.get("EVERY_RECIPE"), reason="EVERY_RECIPE is not set")
CLIPS = ["--config.data.frames=2", "--config.data.test_clips=2", "--config.data.test_crops=1"]


def test_crops_equal_the_release():
    video = recipes.dense_video("structvit_s_4_1_video")
    images, labelled, fine = (
        recipes.imagenet("structvit_s_4_1", stage) for stage in ("224", "224_labels", "384_labels")
    )
    assert video.augment.crop_aspect == (0.75, 1.3333) and images.augment.crop_aspect == (3 / 4, 4 / 3)
    assert images.data.crop_fraction == 0.875
    assert labelled.data.crop_fraction == fine.data.crop_fraction == 0.9  # at 384, too


@pytest.fixture
def recipe(command, tmp_path):
    """Run a recipe for two steps, resume it for a third unless told otherwise, and return its workdir."""

    def run(name, *arguments, resume=True):
        workdir = tmp_path / name.translate(str.maketrans(":,=", "___"))
        given = [f"--config=configs/{name}", *TINY, *arguments, f"--workdir={workdir}"]
        first = command(*given)
        assert first.returncode == 0, first.stderr
        if not resume:
            return workdir
        again = command(*given, "--config.train.duration=3 steps")
        assert again.returncode == 0, again.stderr
        assert "resuming from" in again.stdout and "result: top1" in again.stdout
        assert [r["step"] for r in records(workdir) if "loss" in r] == [1, 2, 3]
        return workdir

    return run


def test_videos_after_images(recipe):
    """Train ImageNet from scratch, then Kinetics from its weights."""
    shallow = "--config.model.depths=(1,)"
    images = recipe("imagenet.py:deit_tiny_struct_2", shallow, resume=False)
    recipe("kinetics400.py:deit_tiny_struct_2_video", shallow, *CLIPS, f"--config.init_from={images}")


@every
def test_images(recipe):
    """At 224 from scratch, at 384 from that; the ablation."""
    plain = recipe("imagenet.py:deit_tiny_struct_2")
    recipe("imagenet.py:deit_tiny_struct_2,384", f"--config.init_from={plain}", "--config.data.size=40")
    sizes = ["--config.data.size=32", "--config.model.image_size=32"]
    recipe("ablations.py:imagenet,structure_dim=2,key_window=5,aggregation=element,depth=1,width=48", *sizes)


@every
def test_token_labelling(recipe, tmp_path):
    """At 224 and, from that, at 384."""
    maps = tmp_path / "maps"
    names, ids = [f"class {i}" for i in range(4)], digest([f"noise/train/{i}" for i in range(40)])
    card = {"images": 40, "class_names": names, "ids": ids}
    writer = LabelMapWriter(str(maps), card, (40, 2, 2, 3))
    rng = np.random.default_rng(0)
    writer.write(0, rng.integers(0, 4, (40, 2, 2, 3)), rng.dirichlet(np.ones(4), (40, 2, 2))[..., :3])
    writer.finish()
    small = [*SMALL, f"--config.data.label_maps={maps}", "--config.data.size=32"]
    labelled = recipe("imagenet.py:structvit_tiny_2_1,224_labels", *small)
    larger = [f"--config.init_from={labelled}", "--config.data.size=48"]
    recipe("imagenet.py:structvit_tiny_2_1,384_labels", *small, *larger)


@every
def test_videos(recipe):
    """Kinetics from ImageNet weights, the others from Kinetics weights; the ablation."""
    images, model = recipe("imagenet.py:deit_tiny_struct_2"), "deit_tiny_struct_2_video"
    kinetics = recipe(f"kinetics400.py:{model}", *CLIPS, f"--config.init_from={images}")
    for name in ("something_v1", "something_v2", "diving48", "finegym"):
        recipe(f"{name}.py:{model}", *CLIPS, f"--config.init_from={kinetics}")
    sizes = [*CLIPS, "--config.data.size=32", "--config.model.image_size=32", "--config.init_from="]
    recipe("ablations.py:something_v1,structure_dim=1,depth=1,width=48", *sizes)
