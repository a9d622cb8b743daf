"""The plain training loop of examples/minimal_train.py."""

import minimal_train

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8}


def test_training_reduces_the_loss(capsys):
    top1 = minimal_train.train(
        "structvit_tiny_2_1_video", steps=40, batch=16, lr=1e-2, test_clips=32, drop_path=0.1, **SMALL
    )
    assert 0 <= top1 <= 1
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.05
