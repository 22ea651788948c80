"""Tables of images with numbers: several numbers, other names of columns, and invalid tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_jpeg

from batteries.core.errors import UserError
from experiment import dataset
from experiment.dataset import Table


def write_table(folder: Path, *lines: str, name: str = "samples.csv") -> Path:
    """Write a table, and an image for each name in its first column."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([*lines, ""]))
    for line in lines[1:]:
        write_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), folder / line.split(",")[0])
    return folder


def test_a_number_is_read_for_each_image_and_an_empty_cell_is_a_test_sample(tmp_path):
    table = Table(write_table(tmp_path, "path,target", "a.jpg,1.5", "b.jpg,-2e1", "c.jpg,"))
    np.testing.assert_array_equal(table.targets, np.array([[1.5], [-20], [np.nan]], dtype=np.float32))
    assert (table.classes, table.official_test.tolist()) == (("target",), [False, False, True])
    image, target = table[0]
    assert (tuple(image.shape), target.dtype, target.tolist()) == ((3, 8, 8), torch.float32, [1.5])


def test_several_numbers_have_a_column_each(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "TARGET_COLUMNS", ("height", "weight"))
    table = Table(write_table(tmp_path, "path,weight,height", "a.jpg,1,2", "b.jpg,3,4"))
    assert (table.classes, table.targets.tolist()) == (("height", "weight"), [[2, 1], [4, 3]])


TWO = {"TARGET_COLUMNS": ("x", "y")}


@pytest.mark.parametrize(
    ("constants", "lines", "message"),
    [
        (
            {},
            ["path,targe", "a.jpg,1"],
            "no column target; it has path, targe; did you mean 'targe'? Set TARGET_",
        ),
        ({}, ["path,target", "a.jpg,1", "b.jpg,old"], "line 3 has 'old' in column target; use a finite number."),
        ({}, ["path,target", "a.jpg,1", "b.jpg,nan"], "line 3 has 'nan' in column target; use a finite number."),
        ({}, ["path,target", "a.jpg,inf"], "line 2 has 'inf' in column target; use a finite number."),
        ({}, ["path,target", "a.jpg,7", "b.jpg,7"], "has only one value, 7, in column target; add other rows."),
        ({}, ["path,target", "a.jpg,", "b.jpg,"], "has no row with a label; write the target of each image."),
        (TWO, ["path,x,y", "a.jpg,1,2", "b.jpg,3,"], "line 3 has some targets empty; fill them in, or leave all of"),
    ],
)
def test_invalid_tables_are_rejected_with_the_constant_to_set(tmp_path, monkeypatch, constants, lines, message):
    for name, value in constants.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError) as error:
        Table(write_table(tmp_path, *lines))
    assert message in str(error.value)
