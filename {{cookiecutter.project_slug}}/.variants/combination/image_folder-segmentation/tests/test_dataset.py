"""Directories of images and masks: official splits, missing and invalid masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_jpeg
from torchvision import tv_tensors

from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN
from batteries.data.masks import encode_mask
from experiment import dataset
from experiment.dataset import MaskFolder

MASK = np.zeros((8, 6), dtype=np.uint8)
MASK[2:5, 1:4] = 1


def write(folder: Path, *names: str, masks: bool = True) -> Path:
    """Write images of 8 x 6 pixels to images/, and the masks of the same names to masks/."""
    for name in names:
        image = folder / "images" / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.zeros(3, 8, 6, dtype=torch.uint8), image)
        if masks:
            mask = folder / "masks" / f"{name}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            mask.write_bytes(encode_mask(MASK))
    return folder


def test_each_image_has_the_mask_of_its_name(tmp_path):
    data = MaskFolder(write(tmp_path, "a", "sub/b"))
    assert data.ids == ["images/a.jpg", "images/sub/b.jpg"]
    image, mask = data[1]
    assert (tuple(image.shape), type(mask)) == ((3, 8, 6), tv_tensors.Mask)
    np.testing.assert_array_equal(mask, MASK)
    assert (data.official_test, data.folds) == (None, None)


def test_official_splits_are_used_and_a_test_split_needs_no_masks(tmp_path):
    write(tmp_path / "train", "a")
    write(tmp_path / "valid", "b")
    write(tmp_path / "test", "c", masks=False)
    data = MaskFolder(tmp_path)
    assert dict(zip(data.ids, data.folds.tolist(), strict=True)) == {
        "train/images/a.jpg": 1,
        "valid/images/b.jpg": 0,
        "test/images/c.jpg": -1,
    }
    assert int(data[data.ids.index("test/images/c.jpg")][1]) == UNKNOWN


def test_black_and_white_masks_and_other_names_are_constants(tmp_path, monkeypatch):
    write(tmp_path, "a")
    (tmp_path / "masks/a_mask.png").write_bytes(encode_mask(MASK * 255))
    monkeypatch.setattr(dataset, "MASK_SUFFIX", "_mask.png")
    monkeypatch.setattr(dataset, "CLASS_OF_VALUE", {0: 0, 255: 1})
    np.testing.assert_array_equal(MaskFolder(tmp_path)[0][1], MASK)


def test_images_without_a_mask_are_named(tmp_path):
    write(tmp_path, "a", "b")
    (tmp_path / "masks/b.png").unlink()
    with pytest.raises(UserError, match=r"1 image without a mask: images/b\.jpg; the mask of the first is masks/b"):
        MaskFolder(tmp_path)


def test_directories_without_images_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"has no images in images/ or train/images/; put the images there, and their"):
        MaskFolder(tmp_path)
    write(tmp_path / "test", "a")
    with pytest.raises(UserError, match=r"has test, but no train/images\."):
        MaskFolder(tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            MASK.T,
            r"masks/b\.png has 6 x 8 pixels \(height x width\), but its image images/b\.jpg has 8 x 6",
        ),
        (MASK * 7, r"masks/b\.png has values without a class: 7; see CLASS_OF_VALUE\."),
    ],
)
def test_invalid_masks_are_named_before_training(tmp_path, mask, message):
    write(tmp_path, "a", "b")
    (tmp_path / "masks/b.png").write_bytes(encode_mask(mask))
    data = MaskFolder(tmp_path)
    data.check(np.array([0]))
    with pytest.raises(UserError, match=rf"has 1 invalid pair of image and mask: images/b\.jpg; .*{message}"):
        data.check(np.arange(2))


def test_the_fingerprint_depends_on_the_masks(tmp_path):
    data = MaskFolder(write(tmp_path, "a"))
    before = data.fingerprint()
    with (tmp_path / "masks/a.png").open("ab") as file:
        file.write(b"more")
    assert data.fingerprint() != before
