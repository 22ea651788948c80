"""Tables of images with labels: both forms, other names of columns, and invalid tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_jpeg

from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN
from experiment import dataset
from experiment.dataset import Table


def write_table(folder: Path, *lines: str, name: str = "samples.csv", images: str = "") -> Path:
    """Write a table, and an image for each name in its first column."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([*lines, ""]))
    (folder / images).mkdir(exist_ok=True)
    suffix = "" if ".jpg" in lines[1] else ".jpg"
    for line in lines[1:]:
        write_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), folder / images / f"{line.split(',')[0]}{suffix}")
    return folder


def test_labels_in_one_cell_are_separated_and_an_empty_cell_has_none(tmp_path):
    table = Table(write_table(tmp_path, "path,labels", "a.jpg,red  ripe", "b.jpg,", "c.jpg,ripe", "d.jpg,2.0 10"))
    assert table.classes == ("2", "10", "red", "ripe")
    assert table.targets.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert table.official_test is None
    image, target = table[0]
    assert (tuple(image.shape), target.tolist()) == ((3, 8, 8), [0, 0, 1, 1])


def test_another_separator_is_a_constant(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LABEL_SEPARATOR", "|")
    table = Table(write_table(tmp_path, "path,labels", "a.jpg,New York|Rome", "b.jpg,Rome", "c.jpg,"))
    assert table.classes == ("New York", "Rome")
    assert table.targets.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_a_table_of_a_competition_is_read_with_its_own_names(tmp_path, monkeypatch):
    names = {"TABLE": "train.csv", "PATH_COLUMN": "image_id", "IMAGE_DIRECTORY": "train_images", "SUFFIX": ".jpg"}
    for name, value in (names | {"LABEL_COLUMNS": ("scab", "rust")}).items():
        monkeypatch.setattr(dataset, name, value)
    lines = ["image_id,scab,rust", "a1,1,0", "a2,0.0,True", "a3,1,1", "a4,,"]
    table = Table(write_table(tmp_path, *lines, name="train.csv", images="train_images"))
    assert (table.ids, table.classes) == (["a1", "a2", "a3", "a4"], ("scab", "rust"))
    assert table.targets.tolist() == [[1, 0], [0, 1], [1, 1], [UNKNOWN, UNKNOWN]]
    assert table.official_test.tolist() == [False, False, False, True]
    assert table[1][0].shape == (3, 8, 8)


COLUMNS = {"LABEL_COLUMNS": ("x", "y")}


@pytest.mark.parametrize(
    ("constants", "lines", "message"),
    [
        (
            {},
            ["path,label", "a.jpg,red"],
            "no column labels; it has path, label; did you mean 'label'? Set LABEL_",
        ),
        (
            {},
            ["image,labels", "a.jpg,red"],
            "no column path; it has image, labels. Set PATH_COLUMN in",
        ),
        (
            {},
            ["path,Labels", "a.jpg,red"],
            "has a column 'Labels', which is not read; rename it to 'labels'",
        ),
        ({}, ["path,labels", "a.jpg,", "b.jpg,"], "has no row with a label; write the labels of each image."),
        (
            {},
            ["path,labels", "a.jpg,red", "b.jpg,red"],
            "has label red in every row; remove the label",
        ),
        (COLUMNS, ["path,x,y", "a.jpg,1,2"], "line 2 has '2' in column y; use 0 or 1."),
        (COLUMNS, ["path,x,y", "a.jpg,1,0", "b.jpg,1,"], "line 3 has some labels empty; fill in 0 or 1, or leave all"),
        (
            COLUMNS,
            ["path,x,y", "a.jpg,1,0", "b.jpg,0,0"],
            "has label y in no row; remove the label",
        ),
        (COLUMNS, ["path,x", "a.jpg,1"], "no column y; it has path, x. Set LABEL_COLUMNS in experiment/dataset.py"),
    ],
)
def test_invalid_tables_are_rejected_with_the_constant_to_set(tmp_path, monkeypatch, constants, lines, message):
    for name, value in constants.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError) as error:
        Table(write_table(tmp_path, *lines))
    assert message in str(error.value)


def test_the_fingerprint_depends_on_the_labels(tmp_path):
    first = Table(write_table(tmp_path / "a", "path,labels", "a.jpg,red", "b.jpg,ripe"))
    second = Table(write_table(tmp_path / "b", "path,labels", "a.jpg,red ripe", "b.jpg,ripe red", "c.jpg,"))
    assert first.fingerprint() != second.fingerprint()
    assert np.array_equal(first.targets.sum(0), [1, 1])
