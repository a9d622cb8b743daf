"""configs/fashion_mnist.py learns from IDX files. The files here hold handwritten digits."""

import json

import cv2
import numpy as np
import pytest
from idx_writer import write_split
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder like that of Fashion-MNIST: 1437 training and 360 test images of 28x28 pixels."""
    root = tmp_path_factory.mktemp("digits")
    scans = load_digits()
    images = [np.clip(cv2.resize(scan * 16, (28, 28)), 0, 255).astype(np.uint8) for scan in scans.images]
    images, labels = np.stack(images), scans.target.astype(np.uint8)
    write_split(root, "train", images[:1437], labels[:1437], compressed=True)
    write_split(root, "t10k", images[1437:], labels[1437:], compressed=True)
    return root


def test_short_run(digits, tmp_path, command):
    run = command(
        "--config=configs/fashion_mnist.py",
        f"--config.data.root={digits}",
        f"--workdir={tmp_path}",
        "--config.train.duration=45 steps",
        "--config.optimizer.warmup=5 steps",
        "--config.data.batch_size=32",
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["top1"] > 0.75  # chance: 0.1
