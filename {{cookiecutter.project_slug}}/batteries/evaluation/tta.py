"""Test-time augmentation: several views of an image, whose probabilities are averaged."""

from typing import Literal

import torch
import torch.nn.functional as F

Views = Literal["none", "flip", "crops", "flip-crops"]


def make_views(images: torch.Tensor, views: Views) -> list[torch.Tensor]:
    """Return the views of a batch, the images themselves first.

    Args:
        images: Images (N, C, H, W).
        views: "flip" adds mirrored images. "crops" adds images shifted towards four corners by an eighth of the shorter
            side, as in Krizhevsky et al. 2012, but with reflected borders, so that the size stays. "flip-crops" adds
            both.

    Returns:
        Views (N, C, H, W).
    """
    found = [images]
    if "crops" in views:
        found += _shifts(images, max(1, min(images.shape[-2:]) // 8))
    if "flip" in views:
        found += [view.flip(-1) for view in found]
    return found


def _shifts(images: torch.Tensor, pixels: int) -> list[torch.Tensor]:
    """Return the images shifted by `pixels` towards each of four corners, as float."""
    height, width = images.shape[-2:]
    padding = (pixels, pixels, pixels, pixels)
    padded = F.pad(images.float(), padding, mode="reflect")  # exact for integers up to 2^24
    corners = [(top, left) for top in (0, 2 * pixels) for left in (0, 2 * pixels)]
    return [padded[..., top : top + height, left : left + width] for top, left in corners]
