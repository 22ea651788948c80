"""Small data for whole runs in tests: 240 images in the format of CIFAR-10, without a download."""

import hashlib
import pickle
from pathlib import Path

from image_data import patterned_images
from torchvision.datasets import CIFAR10

from experiment import dataset as cifar10

NEEDS_PATCH = True  # whether new processes, such as scripts, cannot read the data: torchvision checks md5 sums
TEST_FILES = ("cifar-10-batches-py/test_batch",)  # the files that contain only the official test split
LABELS = list(range(10)) * 4  # of each file


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`. In this process and its forks torchvision accepts the files."""
    files = directory / CIFAR10.base_folder
    files.mkdir(parents=True)
    images = patterned_images(LABELS * 6, 3, 32).reshape(6, len(LABELS), -1)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (files / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    batches = [{"data": part, "labels": LABELS} for part in images]
    CIFAR10.train_list = [write(f"data_batch_{number}", batch) for number, batch in enumerate(batches[:5], 1)]
    CIFAR10.test_list = [write("test_batch", batches[5])]
    cifar10.TEST_SIZE = len(LABELS)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    name, md5 = write("batches.meta", {"label_names": names})
    CIFAR10.meta = {"filename": name, "key": "label_names", "md5": md5}
    return directory


def change_one_sample(dataset: cifar10.Cifar10) -> cifar10.Cifar10:
    """Return the same data except for one image."""
    dataset.images[0] = 255 - dataset.images[0]
    return dataset
