"""Small data for whole runs in tests: 200 JPEG files in the directories of ten classes."""

from pathlib import Path

import torch
from image_data import patterned_images, write_jpeg

from experiment.dataset import ImageFolder, load_dataset

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = ()  # the files that contain only the official test split
LABELS = list(range(10)) * 20


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`."""
    for index, (label, image) in enumerate(zip(LABELS, patterned_images(LABELS, 3, 32), strict=True)):
        path = directory / f"class{label}/{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.from_numpy(image), path)
    return directory


def change_one_sample(dataset: ImageFolder) -> ImageFolder:
    """Return the same data except for the size of one file."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
