"""Small data for whole runs in tests: a table of 200 JPEG files of ten classes, two per owner."""

from pathlib import Path

import torch
from image_data import patterned_images, write_jpeg

from experiment.dataset import TABLE, Table, load_dataset

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = ()  # the files that contain only the official test split
LABELS = list(range(10)) * 20


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`."""
    (directory / "images").mkdir(parents=True)
    rows = ["path,label,group"]
    for index, (label, image) in enumerate(zip(LABELS, patterned_images(LABELS, 3, 32), strict=True)):
        write_jpeg(torch.from_numpy(image), directory / f"images/{index:03d}.jpg")
        rows.append(f"images/{index:03d}.jpg,{label},owner{index // 20 * 10 + index % 10}")
    (directory / TABLE).write_text("\n".join(rows) + "\n")
    return directory


def change_one_sample(dataset: Table) -> Table:
    """Return the same data except for the size of one file."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
