"""The networks of experiment/model.py return a value for each class and pixel."""

import pytest
import torch

from batteries.core.errors import UserError
from experiment import model
from experiment.augmentations import MEAN


@pytest.mark.parametrize("size", [(24, 24), (17, 30)])
@pytest.mark.parametrize("options", [{}, {"width": 4, "levels": 2}])
def test_the_output_of_the_unet_has_the_size_of_the_image(size, options):
    network = model.build_model(num_classes=3, **options)
    assert network(torch.rand(2, len(MEAN), *size)).shape == (2, 3, *size)


def test_networks_of_torchvision_can_be_chosen():
    network = model.build_model(num_classes=3, name="lraspp_mobilenet_v3_large").eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 64, 48)).shape == (2, 3, 64, 48)


def test_an_unknown_network_is_rejected_with_the_nearest_names():
    with pytest.raises(UserError, match=r"^--model deeplabv3_resnet5 is .*; use one of .*deeplabv3_resnet50"):
        model.build_model(num_classes=3, name="deeplabv3_resnet5")


def test_an_unknown_argument_of_the_unet_is_rejected():
    with pytest.raises(UserError, match=r"^--model-args depth=2: unet does not accept that"):
        model.build_model(num_classes=3, depth=2)
