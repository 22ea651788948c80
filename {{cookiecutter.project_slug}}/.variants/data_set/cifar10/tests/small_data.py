"""Data for whole runs in tests: 200 random pictures in the format of CIFAR-10, without a download."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

NEEDS_PATCH = True  # torchvision checks md5 sums: scripts, which start processes of their own, cannot read these files


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test. In this process and its forks torchvision takes the files for the real ones."""
    generator = np.random.default_rng(0)
    files = folder / CIFAR10.base_folder
    files.mkdir()

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (files / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def pictures() -> dict:
        return {"data": generator.integers(256, size=(40, 3072), dtype=np.uint8), "labels": list(range(10)) * 4}

    CIFAR10.train_list = [write(f"data_batch_{number}", pictures()) for number in range(1, 6)]
    CIFAR10.test_list = []
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    name, md5 = write("batches.meta", {"label_names": names})
    CIFAR10.meta = {"filename": name, "key": "label_names", "md5": md5}
    return folder
