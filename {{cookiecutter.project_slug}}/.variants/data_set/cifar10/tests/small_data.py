"""Data for whole runs in tests: 200 small pictures in the format of CIFAR-10, without a download."""

import hashlib
import pickle
from pathlib import Path

from pictures import patterned
from torchvision.datasets import CIFAR10

from experiment import dataset as cifar10

NEEDS_PATCH = True  # torchvision checks md5 sums: scripts, which start processes of their own, cannot read these files
TEST_FILES = ("cifar-10-batches-py/test_batch",)  # with nothing but the official test split in them
LABELS = list(range(10)) * 4  # of each file


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test. In this process and its forks torchvision takes the files for the real ones."""
    files = folder / CIFAR10.base_folder
    files.mkdir(parents=True)
    images = patterned(LABELS * 6, 3, 32).reshape(6, len(LABELS), -1)

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
    return folder


def change_one_sample(dataset: cifar10.Cifar10) -> cifar10.Cifar10:
    """The same data but for one image."""
    dataset.images[0] = 255 - dataset.images[0]
    return dataset
