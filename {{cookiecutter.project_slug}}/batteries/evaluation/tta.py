"""Test-time augmentation: several views of an image, whose probabilities are averaged."""

from typing import Literal

import torch
import torch.nn.functional as F

Views = Literal["none", "flip", "crops", "flip-crops"]


def make_views(images: torch.Tensor, views: Views) -> list[torch.Tensor]:
    """Views of images (N, C, H, W), each of the same shape, the images themselves first.

    flip: and mirrored. crops: and shifted to four corners by an eighth of the shorter side, as in Krizhevsky et al.
    2012, but with mirrored borders, so that the size stays.
    """
    found = [images]
    if "crops" in views:
        found += _shifts(images, max(1, min(images.shape[-2:]) // 8))
    if "flip" in views:
        found += [view.flip(-1) for view in found]
    return found


def _shifts(images: torch.Tensor, by: int) -> list[torch.Tensor]:
    height, width = images.shape[-2:]
    padded = F.pad(images.float(), (by, by, by, by), mode="reflect")  # of whole numbers up to 2^24 exact
    corners = [(top, left) for top in (0, 2 * by) for left in (0, 2 * by)]
    return [padded[..., top : top + height, left : left + width] for top, left in corners]
