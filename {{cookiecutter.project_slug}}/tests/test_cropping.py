"""Random resized crops have the boxes and the pixels of torchvision's."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from batteries.core.seeding import reseed
from batteries.data.collation import SampleNames, collate
from batteries.data.cropping import Box, RandomResizedCrop, draw_box, resized_crop

DRAWS = 10_000
RATIO = (3 / 4, 4 / 3)


def channels_last(image: torch.Tensor) -> torch.Tensor:
    """Return the same image with the channels of a pixel side by side, as a decoder returns it."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def random_image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (channels, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.25, 1.0)), (500, 375, (0.08, 1.0)), (60, 600, (0.5, 1.0)), (32, 32, (0.08, 1.0))],
)
def test_boxes_have_the_distribution_of_torchvision(height, width, scale):
    theirs = v2.RandomResizedCrop(224, scale=scale, antialias=True)
    torch.manual_seed(1)
    random.seed(2)
    image = torch.empty((1, height, width), dtype=torch.uint8)
    wanted = [theirs.make_params([image]) for _ in range(DRAWS)]
    wanted = np.array([[params["top"], params["left"], params["height"], params["width"]] for params in wanted])
    drawn = np.array([draw_box(height, width, scale, RATIO) for _ in range(DRAWS)])
    for column in range(4):
        assert ks_2samp(drawn[:, column], wanted[:, column]).pvalue > 1e-3, Box._fields[column]
    for derive in (lambda boxes: boxes[:, 2] * boxes[:, 3], lambda boxes: boxes[:, 3] / boxes[:, 2]):
        assert ks_2samp(derive(drawn), derive(wanted)).pvalue > 1e-3
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, 0] + drawn[:, 2] <= height).all()
    assert (drawn[:, 1] + drawn[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (300, 300)])
def test_an_image_in_which_no_box_fits_is_cropped_in_the_centre_as_torchvision_does(height, width):
    theirs = v2.RandomResizedCrop(8, scale=(3.0, 4.0), antialias=True)
    params = theirs.make_params([torch.empty((1, height, width))])
    expected = Box(params["top"], params["left"], params["height"], params["width"])
    assert draw_box(height, width, (3.0, 4.0), RATIO) == expected


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("box", [Box(0, 0, 60, 80), Box(7, 13, 40, 31), Box(59, 79, 1, 1), Box(2, 3, 11, 9)])
def test_pixels_are_those_of_torchvision_for_the_same_box(channels, dtype, box):
    image = random_image(60, 80, channels).to(dtype)
    expected = functional.resized_crop(channels_last(image), *box, [24, 24], antialias=True)
    assert torch.equal(resized_crop(channels_last(image), box, 24), expected)
    if dtype == torch.uint8:  # the rounding of floats depends on the order in memory
        assert torch.equal(resized_crop(image, box, 24), expected)


def test_a_crop_depends_on_the_stream_of_its_sample_only():
    crop = RandomResizedCrop(16)
    image = random_image(40, 50)
    results = []
    for seed, before in ((3, 0), (3, 5), (4, 0)):
        for _ in range(before):
            crop(image, 0)
        reseed(seed)
        results.append(crop(image, 0)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_half_of_the_crops_are_mirrored():
    image = random_image(16, 16)
    crop = RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    random.seed(0)
    crops = [crop(image, 0)[0] for _ in range(1000)]
    mirrored = [torch.equal(result, image.flip(-1)) for result in crops]
    assert all(is_mirrored or torch.equal(result, image) for is_mirrored, result in zip(mirrored, crops, strict=True))
    assert 430 < sum(mirrored) < 570  # 4.4 standard deviations


def test_a_transform_of_torchvision_can_follow():
    transform = v2.Compose([RandomResizedCrop(16), v2.ColorJitter(brightness=0.5)])
    image, target = transform(random_image(40, 50), 7)
    assert (image.shape, image.dtype, target) == ((3, 16, 16), torch.uint8, 7)
    assert repr(RandomResizedCrop(16)) in repr(transform)


@pytest.mark.parametrize("last", ["channels last", "contiguous", "mixed"])
def test_a_batch_has_the_pixels_and_the_order_in_memory_of_its_images(last):
    images = [random_image(5, 6) + number for number in range(4)]
    given = list(images)
    if last != "contiguous":
        given = [channels_last(image) for image in images]
    if last == "mixed":
        given[2] = images[2]
    batch, targets = collate(None, [(image, index) for index, image in enumerate(given)], SampleNames(None, range(4)))
    assert torch.equal(batch, torch.stack(images))
    assert targets.tolist() == [0, 1, 2, 3]
    assert batch.is_contiguous(memory_format=torch.channels_last) == (last == "channels last")
