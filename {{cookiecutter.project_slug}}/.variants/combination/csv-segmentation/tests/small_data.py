"""Small data for whole runs in tests: a table of 200 JPEG files with a bright rectangle, and its mask."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import write_jpeg

from batteries.data.masks import encode_mask
from experiment.dataset import TABLE, load_dataset

NEEDS_PATCH = False  # whether new processes, such as scripts, cannot read the data
TEST_FILES = ()  # the files that contain only the official test split
SIZE = 32


def make_data(directory: Path) -> Path:
    """Create the data and return their `data_dir`."""
    for name in ("images", "masks"):
        (directory / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = ["path,mask"]
    for index in range(200):
        image = generator.integers(120, size=(3, SIZE, SIZE), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
        top, left = generator.integers(SIZE // 2, size=2)
        box = np.s_[top : top + SIZE // 2, left : left + SIZE // 3]
        image[:, *box] += 100
        mask[box] = 1
        write_jpeg(torch.from_numpy(image), directory / f"images/{index:03d}.jpg")
        (directory / f"masks/{index:03d}.png").write_bytes(encode_mask(mask))
        rows.append(f"images/{index:03d}.jpg,masks/{index:03d}.png")
    (directory / TABLE).write_text("\n".join(rows) + "\n")
    return directory


def change_one_sample(dataset: Any) -> Any:
    """Return the same data except for the size of one mask."""
    with (dataset.data_dir / "masks/000.png").open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
