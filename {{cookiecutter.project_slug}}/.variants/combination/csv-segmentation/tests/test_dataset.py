"""Tables of images with masks: files, run-length encoding, and invalid tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_jpeg
from torchvision import tv_tensors

from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN
from batteries.data.masks import encode_mask, encode_runs
from experiment import dataset
from experiment.dataset import Table

MASK = np.zeros((8, 6), dtype=np.uint8)
MASK[2:5, 1:4] = 1


def write_table(folder: Path, *lines: str) -> Path:
    """Write a table, an image of 8 x 6 pixels for each name in its first column, and the mask m.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.csv").write_text("\n".join([*lines, ""]))
    for line in lines[1:]:
        write_jpeg(torch.zeros(3, 8, 6, dtype=torch.uint8), folder / line.split(",")[0])
    (folder / "m.png").write_bytes(encode_mask(MASK))
    return folder


def use(monkeypatch, **constants: object) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(dataset, name, value)


def test_a_mask_is_read_with_its_image_and_an_empty_cell_is_a_test_sample(tmp_path):
    table = Table(write_table(tmp_path, "path,mask", "a.jpg,m.png", "b.jpg,"))
    image, mask = table[0]
    assert (tuple(image.shape), type(mask)) == ((3, 8, 6), tv_tensors.Mask)
    np.testing.assert_array_equal(mask, MASK)
    assert int(table[1][1]) == UNKNOWN
    assert table.official_test.tolist() == [False, True]


def test_run_lengths_of_one_class_are_decoded_and_an_empty_cell_is_background(tmp_path, monkeypatch):
    use(monkeypatch, RLE_COLUMN="rle")
    table = Table(write_table(tmp_path, "path,rle", f"a.jpg,{encode_runs(MASK)}", "b.jpg,"))
    np.testing.assert_array_equal(table[0][1], MASK)
    assert not table[1][1].any()
    assert table.official_test is None


def test_several_rows_of_an_image_have_a_class_each(tmp_path, monkeypatch):
    use(monkeypatch, RLE_COLUMN="rle", CLASS_COLUMN="class", CLASSES=("background", "road", "car"))
    lines = ["path,class,rle", "a.jpg,road,1 8", "b.jpg,,", "a.jpg,car,4 2"]
    table = Table(write_table(tmp_path, *lines))
    assert (table.ids, len(table)) == (["a.jpg", "b.jpg"], 2)
    expected = np.zeros((8, 6), dtype=np.uint8)
    expected[:, 0] = 1
    expected[3:5, 0] = 2
    np.testing.assert_array_equal(table[0][1], expected)
    assert not table[1][1].any()
    changed = Table(write_table(tmp_path / "other", *lines[:-1], "a.jpg,car,4 3"))
    assert changed.fingerprint() != table.fingerprint()


@pytest.mark.parametrize(
    ("constants", "lines", "message"),
    [
        (
            {},
            ["path,masks", "a.jpg,m.png"],
            "no column mask; it has path, masks; did you mean 'masks'? Set MASK",
        ),
        ({}, ["path,mask", "a.jpg,x.png"], "lists 1 missing or empty mask: a.jpg (line 2); correct the column mask."),
        ({}, ["path,mask", "a.jpg,"], "has no row with a label; write the target of each image."),
        (
            {"RLE_COLUMN": "rle", "CLASS_COLUMN": "class"},
            ["path,class,rle", "a.jpg,boat,1 2"],
            "line 2 has class 'boat'; use one of background, object, or set CLASSES in experiment/dataset.py.",
        ),
        (
            {"RLE_COLUMN": "rle", "CLASSES": ("a", "b", "c")},
            ["path,rle", "a.jpg,1 2"],
            "is read with 3 CLASSES and without CLASS_COLUMN; set CLASS_COLUMN in experiment/dataset.py.",
        ),
    ],
)
def test_invalid_tables_are_rejected_with_the_constant_to_set(tmp_path, monkeypatch, constants, lines, message):
    use(monkeypatch, **constants)
    with pytest.raises(UserError) as error:
        Table(write_table(tmp_path, *lines))
    assert message in str(error.value)


def test_masks_of_another_size_and_invalid_encodings_are_named(tmp_path, monkeypatch):
    folder = write_table(tmp_path, "path,mask", "a.jpg,m.png", "b.jpg,n.png")
    (folder / "n.png").write_bytes(encode_mask(MASK.T))
    with pytest.raises(UserError, match=r"invalid pair: b\.jpg \(line 3\); .* 6 x 8 pixels"):
        Table(folder).check(np.arange(2))
    use(monkeypatch, RLE_COLUMN="rle")
    with pytest.raises(UserError, match=r"line 2: the run-length encoding '40 20' leaves its image of 8 x 6 pixels"):
        Table(write_table(tmp_path, "path,rle", "a.jpg,40 20"))[0]
