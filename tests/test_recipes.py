"""Every recipe of the paper, with a tiny model on random data of the right shapes.

Each trains, evaluates, saves, resumes, and starts from what the paper starts from.
"""

import numpy as np
import pytest
from conftest import records
from test_start import SMALL

from structvit_jax.data.label_maps import LabelMapWriter, digest

TINY = [
    *SMALL,
    "--config.data.name=noise:4",
    "--config.data.size=32",
    "--config.data.workers=0",
    "--config.data.batch_size=4",
    "--config.checkpoint.every=1 steps",
]
DEIT = ["--config.model.depths=(1,)", "--config.model.widths=(16,)", "--config.model.image_size=32"]
CLIPS = ["--config.data.frames=2", "--config.data.test_clips=2", "--config.data.test_crops=1"]


@pytest.fixture
def recipe(command, tmp_path):
    """Runs a recipe for two steps, resumes it for a third, and returns its workdir."""

    def run(name, *arguments):
        workdir = tmp_path / name.translate(str.maketrans(":,=", "___"))
        given = [f"--config=configs/{name}", *TINY, *arguments, f"--workdir={workdir}"]
        first = command(*given)
        assert first.returncode == 0, first.stderr
        again = command(*given, "--config.train.duration=3 steps")
        assert again.returncode == 0, again.stderr
        assert "resuming from" in again.stdout and "result: top1" in again.stdout
        assert [r["step"] for r in records(workdir) if "loss" in r] == [1, 2, 3]
        return workdir

    return run


def test_images(recipe, tmp_path):
    """At 224 from scratch, at 384 from that, and both with token labelling; the ablation."""
    plain = recipe("imagenet.py:structvit_tiny_4_1")
    recipe("imagenet.py:structvit_tiny_4_1,384", f"--config.init_from={plain}", "--config.data.size=48")
    maps = tmp_path / "maps"
    names, ids = [f"class {i}" for i in range(4)], digest([f"noise/train/{i}" for i in range(40)])
    card = {"images": 40, "class_names": names, "ids": ids}
    writer = LabelMapWriter(str(maps), card, (40, 2, 2, 3))
    rng = np.random.default_rng(0)
    writer.write(0, rng.integers(0, 4, (40, 2, 2, 3)), rng.dirichlet(np.ones(4), (40, 2, 2))[..., :3])
    writer.finish()
    labelled = recipe("imagenet.py:structvit_tiny_4_1,224_labels", f"--config.data.label_maps={maps}")
    larger = [f"--config.data.label_maps={maps}", f"--config.init_from={labelled}", "--config.data.size=48"]
    recipe("imagenet.py:structvit_tiny_4_1,384_labels", *larger)
    recipe("ablations.py:imagenet,structure_dim=2,key_window=5,aggregation=element", *DEIT)


def test_videos(recipe):
    """Kinetics from ImageNet weights, the others from Kinetics weights; the ablation."""
    images = recipe("imagenet.py:structvit_tiny_2_1")
    kinetics = recipe("kinetics400.py:structvit_tiny_2_1_video", *CLIPS, f"--config.init_from={images}")
    for name in ("something_v1", "something_v2", "diving48", "finegym"):
        model = "structvit_tiny_2_1_video"
        recipe(f"{name}.py:{model}", *CLIPS, f"--config.init_from={kinetics}")
    recipe("ablations.py:something_v1,structure_dim=1", *DEIT, *CLIPS, "--config.init_from=")
