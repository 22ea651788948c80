"""Small data for whole runs in tests: a table of 200 JPEG files, each with some of four labels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import write_jpeg

from experiment.dataset import TABLE, load_dataset

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = ()  # the files that contain only the official test split
NAMES = ("north", "east", "south", "west")


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`: label k brightens quarter k of the image."""
    (directory / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=(200, 4))
    rows = ["path,labels"]
    for index, present in enumerate(labels):
        image = generator.integers(100, size=(3, 32, 32), dtype=np.uint8)
        for number in np.flatnonzero(present):
            image[:, 8 * number : 8 * number + 8] += 120
        write_jpeg(torch.from_numpy(image), directory / f"images/{index:03d}.jpg")
        names = " ".join(NAMES[number] for number in np.flatnonzero(present))
        rows.append(f"images/{index:03d}.jpg,{names}")
    (directory / TABLE).write_text("\n".join(rows) + "\n")
    return directory


def change_one_sample(dataset: Any) -> Any:
    """Return the same data except for the size of one file."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
