"""Masks: files, run-length encoding, metrics and augmentation, compared with slow references."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays
from image_data import RandomImages
from PIL import Image
from sklearn import metrics
from torchvision import tv_tensors
from torchvision.transforms import v2

from batteries.core.errors import UserError
from batteries.core.seeding import seed_all
from batteries.data.cropping import RandomResizedCrop
from batteries.data.loaders import EvalLoader
from batteries.data.masks import decode_runs, encode_mask, encode_runs, palette, read_mask
from batteries.data.mixing import MaskCutMix
from batteries.metrics.masks import IGNORED, PixelCounts, count_pixels

MASKS = arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9))
CPU = torch.device("cpu")


def slow_runs(mask: np.ndarray) -> str:
    """Encode one pixel at a time, from top to bottom, then from left to right."""
    runs: list[list[int]] = []
    number = 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            number += 1
            if not mask[row, column]:
                continue
            if runs and sum(runs[-1]) == number:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
    return " ".join(f"{start} {length}" for start, length in runs)


@given(MASKS)
def test_run_length_encoding_equals_a_slow_one_and_is_decoded_to_the_same_mask(mask):
    assert encode_runs(mask) == slow_runs(mask)
    np.testing.assert_array_equal(decode_runs(encode_runs(mask), *mask.shape), mask)


def test_run_length_encoding_of_an_example():
    mask = np.array([[0, 1, 1], [0, 1, 0]])
    assert encode_runs(mask) == "3 3"
    assert encode_runs(np.zeros((2, 2))) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "must be pairs of start and length."),
        ("1 x", "must be pairs of start and length."),
        ("0 1", "leaves its image of 2 x 3 pixels, which are counted from 1 to 6."),
        ("5 3", "leaves its image of 2 x 3 pixels"),
        ("1 0", "leaves its image"),
        ("1 -1", "must be pairs"),
    ],
)
def test_invalid_run_length_encoding_is_rejected(text, message):
    with pytest.raises(UserError) as error:
        decode_runs(text, 2, 3)
    assert message in str(error.value)


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_written_masks_are_read_with_the_same_classes(tmp_path_factory, mask):
    path = tmp_path_factory.getbasetemp() / "mask.png"
    path.write_bytes(encode_mask(mask))
    np.testing.assert_array_equal(read_mask(path), mask)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette()[mask])


def test_the_first_colours_are_those_of_voc():
    assert palette()[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette()[15].tolist() == [192, 128, 128]
    assert palette()[255].tolist() == [224, 224, 192]


def write(path: Path, values: np.ndarray, mode: str) -> Path:
    image = Image.fromarray(values)
    image = image if image.mode == mode else image.convert(mode)
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_of_one_value_per_pixel_are_read(tmp_path, mode):
    values = np.array([[0, 1], [2, 255]], dtype=np.uint16 if mode == "I;16" else np.uint8)
    path = tmp_path / "mask.png"
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
        assert image.mode == "P"
    image.save(path)
    np.testing.assert_array_equal(read_mask(path), values)
    np.testing.assert_array_equal(read_mask(path, {0: 3, 1: 2, 2: 1, 255: 0}), [[3, 2], [1, 0]])


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (np.zeros((2, 2, 3), np.uint8), "RGB", "has the colour mode RGB; a mask has one value per pixel"),
        (np.array([[0, 7]], np.uint8), "L", "has values without a class: 7; see CLASS_OF_VALUE."),
        (np.array([[0, 300]], np.uint16), "I;16", "has values without a class: 300"),
    ],
)
def test_masks_with_colours_or_unknown_values_are_rejected(tmp_path, values, mode, message):
    path = write(tmp_path / "mask.png", values, mode)
    with pytest.raises(UserError) as error:
        read_mask(path, {0: 0, 1: 1})
    assert message in str(error.value)


def test_a_file_that_is_not_an_image_is_rejected(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"nothing")
    for name in ("mask.png", "missing.png"):
        with pytest.raises(UserError, match="cannot be read as a mask"):
            read_mask(tmp_path / name)


def test_metrics_equal_those_of_scikit_learn_over_all_counted_pixels():
    generator = np.random.default_rng(0)
    targets = generator.integers(3, size=(4, 6, 5))
    targets[generator.random(targets.shape) < 0.2] = IGNORED
    predicted = generator.integers(3, size=targets.shape)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(targets), 3).numpy()
    counted = targets != IGNORED
    for image in range(4):
        pairs = targets[image][counted[image]], predicted[image][counted[image]]
        np.testing.assert_array_equal(counts[image], metrics.confusion_matrix(*pairs, labels=range(3)))
    pixels = targets[counted], predicted[counted]
    computed = PixelCounts.of(counts.mean(0)).metrics()
    assert PixelCounts.of(counts).total().metrics()["mean_iou"] == pytest.approx(computed["mean_iou"])
    np.testing.assert_allclose(computed["iou/"], metrics.jaccard_score(*pixels, average=None))
    assert computed["mean_iou"] == pytest.approx(metrics.jaccard_score(*pixels, average="macro"))
    assert computed["mean_dice"] == pytest.approx(metrics.f1_score(*pixels, average="macro"))
    assert computed["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(*pixels))


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    pixels = PixelCounts.of(counts)
    np.testing.assert_allclose(pixels.iou(), [3 / 4, 4 / 5, np.nan])
    np.testing.assert_allclose(pixels.dice(), [6 / 7, 8 / 9, np.nan])
    assert pixels.metrics()["mean_iou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert np.isnan(PixelCounts.of(np.zeros((2, 2))).metrics()["mean_iou"])


def test_a_random_crop_moves_a_mask_with_its_image():
    image = torch.arange(40 * 30, dtype=torch.int32).view(1, 40, 30)
    blocks = (image // 30 // 10 * 4 + image % 30 // 10).to(torch.uint8)  # large areas of one value
    crop = v2.Compose([RandomResizedCrop(32)])
    for seed in range(20):
        seed_all(seed)
        result, mask = crop(blocks * 10, tv_tensors.Mask(blocks[0]))
        assert isinstance(mask, tv_tensors.Mask)
        assert (result[0].float() / 10 - mask.float()).abs().median() < 0.1  # they differ at borders only
        seed_all(seed)
        without_mask, _ = crop(blocks * 10, 0)
        assert torch.equal(result, without_mask)


def test_cutmix_pastes_the_same_box_into_image_and_mask():
    images = torch.arange(4, dtype=torch.float32).view(4, 1, 1, 1).expand(4, 3, 16, 12)
    masks = torch.arange(4, dtype=torch.uint8).view(4, 1, 1).expand(4, 16, 12)
    changed = 0
    for seed in range(20):
        seed_all(seed)
        mixed_images, mixed_masks = MaskCutMix(1.0)(images, masks)
        assert torch.equal(mixed_images[:, 0], mixed_masks.float())
        for position in range(4):
            values = mixed_masks[position].unique().tolist()
            assert set(values) <= {position, (position - 1) % 4}
            changed += (position - 1) % 4 in values
    assert changed > 40


class Masked(RandomImages):
    """Images of which the last one has a mask with an unknown value."""

    ids = tuple(f"image{index}" for index in range(8))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tv_tensors.Mask]:
        mask = torch.full((8, 8), index % 4, dtype=torch.uint8)
        mask[0, 0] = IGNORED
        if index == 7:
            mask[3, 3] = 9
        return self.images[index], tv_tensors.Mask(mask)


def test_a_mask_with_an_unknown_class_is_rejected_with_its_sample():
    assert len(list(EvalLoader(Masked(8), range(7), None, CPU, batch_size=4))) == 2
    with pytest.raises(UserError, match=r"a mask with 9 for sample image7; with 4 classes a pixel must be 0 to 3, or"):
        list(EvalLoader(Masked(8), range(8), None, CPU, batch_size=4))


def test_random_numbers_of_a_crop_do_not_depend_on_the_target():
    random.seed(0)
    RandomResizedCrop(8)(torch.zeros(3, 9, 9), 0)
    after = random.random()
    random.seed(0)
    RandomResizedCrop(8)(torch.zeros(3, 9, 9), tv_tensors.Mask(torch.zeros(9, 9)))
    assert random.random() == after
