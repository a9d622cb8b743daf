"""Write IDX files, the format of MNIST."""

import gzip

import numpy as np


def idx_bytes(array):
    """Return an array of uint8 as the content of an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_split(folder, name, images, labels, *, compressed=False, dot="-"):
    """Write the files of images, uint8 [examples, height, width], and of labels, uint8 [examples]."""
    for kind, array in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
        content = idx_bytes(np.ascontiguousarray(array))
        path = folder / f"{name}-{kind}-ubyte{'.gz' * compressed}"
        path.write_bytes(gzip.compress(content) if compressed else content)
