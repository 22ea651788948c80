"""Data for whole runs in tests: 200 small JPEG files in folders of ten classes."""

from pathlib import Path

import torch
from pictures import patterned
from torchvision.io import write_jpeg

from experiment.dataset import ImageFolder, load_dataset

NEEDS_PATCH = False  # scripts, which start processes of their own, can read it
TEST_FILES = ()  # with nothing but the official test split in them
LABELS = list(range(10)) * 20


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test."""
    for index, (label, image) in enumerate(zip(LABELS, patterned(LABELS, 3, 32), strict=True)):
        path = folder / f"class{label}/{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.from_numpy(image), str(path))
    return folder


def change_one_sample(dataset: ImageFolder) -> ImageFolder:
    """The same data but for one file, which has another size."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
