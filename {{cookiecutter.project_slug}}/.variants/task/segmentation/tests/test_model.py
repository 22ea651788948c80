"""The networks of experiment/model.py return a value for each class and pixel."""

import pytest
import torch
from torchvision.models import list_models, segmentation

from batteries.core.errors import UserError
from experiment import model
from experiment.augmentations import MEAN


@pytest.mark.parametrize("size", [(24, 24), (17, 30)])
def test_the_output_of_the_unet_has_the_size_of_the_image(size):
    network = model.build_model(num_classes=3)
    assert network(torch.rand(2, len(MEAN), *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_networks_of_torchvision_can_be_chosen(monkeypatch, name):
    assert name in list_models(segmentation)
    monkeypatch.setattr(model, "NETWORK", name)
    network = model.build_model(num_classes=3).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 64, 48)).shape == (2, 3, 64, 48)


def test_an_unknown_network_is_rejected_with_the_nearest_name(monkeypatch):
    monkeypatch.setattr(model, "NETWORK", "deeplabv3_resnet5")
    with pytest.raises(UserError, match=r"is not unet or one of .*; did you mean 'deeplabv3_resnet50'\?"):
        model.build_model(num_classes=3)
