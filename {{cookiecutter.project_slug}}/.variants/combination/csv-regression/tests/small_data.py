"""Small data for whole runs in tests: a table of 200 JPEG files with the brightness of each, from 0 to 200."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import write_jpeg

from experiment.dataset import TABLE, load_dataset

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = ()  # the files that contain only the official test split


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`."""
    (directory / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = ["path,target"]
    for index, level in enumerate(generator.uniform(0, 200, size=200)):
        image = (generator.integers(50, size=(3, 32, 32)) + level).astype(np.uint8)
        write_jpeg(torch.from_numpy(image), directory / f"images/{index:03d}.jpg")
        rows.append(f"images/{index:03d}.jpg,{level:.2f}")
    (directory / TABLE).write_text("\n".join(rows) + "\n")
    return directory


def change_one_sample(dataset: Any) -> Any:
    """Return the same data except for the size of one file."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
