"""Small data for whole runs in tests: 200 images in the format of MNIST, without a download."""

import struct
from pathlib import Path

import numpy as np
from image_data import patterned_images

from experiment.dataset import TEST_SIZE, Mnist

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = (
    "MNIST/raw/t10k-images-idx3-ubyte",
    "MNIST/raw/t10k-labels-idx1-ubyte",
)  # the files that contain only the official test split


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`."""
    files = directory / "MNIST/raw"
    files.mkdir(parents=True)

    def write(name: str, values: np.ndarray) -> None:
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)  # 8: unsigned bytes
        (files / name).write_bytes(header + values.astype(np.uint8).tobytes())

    for part, labels in (("train", list(range(10)) * 20), ("t10k", [index % 10 for index in range(TEST_SIZE)])):
        images = patterned_images(labels, 1, 28)[:, 0] if part == "train" else np.zeros((TEST_SIZE, 28, 28))
        write(f"{part}-images-idx3-ubyte", images)
        write(f"{part}-labels-idx1-ubyte", np.array(labels))
    return directory


def change_one_sample(dataset: Mnist) -> Mnist:
    """Return the same data except for one image."""
    dataset.images[0] = 255 - dataset.images[0]
    return dataset
