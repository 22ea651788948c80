"""Data for whole runs in tests: a table of 200 small JPEG files of ten classes, two of one owner each."""

from pathlib import Path

import torch
from pictures import patterned
from torchvision.io import write_jpeg

from experiment.dataset import TABLE, Table, load_dataset

NEEDS_PATCH = False  # scripts, which start processes of their own, can read it
TEST_FILES = ()  # with nothing but the official test split in them
LABELS = list(range(10)) * 20


def make_data(folder: Path) -> Path:
    """The `data_dir` for a test."""
    (folder / "images").mkdir(parents=True)
    rows = ["path,label,group"]
    for index, (label, image) in enumerate(zip(LABELS, patterned(LABELS, 3, 32), strict=True)):
        write_jpeg(torch.from_numpy(image), str(folder / f"images/{index:03d}.jpg"))
        rows.append(f"images/{index:03d}.jpg,{label},owner{index // 20 * 10 + index % 10}")
    (folder / TABLE).write_text("\n".join(rows) + "\n")
    return folder


def change_one_sample(dataset: Table) -> Table:
    """The same data but for one file, which has another size."""
    with (dataset.data_dir / dataset.ids[0]).open("ab") as file:
        file.write(b"more")
    return load_dataset(dataset.data_dir)
