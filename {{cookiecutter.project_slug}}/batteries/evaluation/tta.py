"""Test-time augmentation: several views of an image, whose predictions are averaged."""

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


def undo_views(masks: list[torch.Tensor], views: Views) -> list[torch.Tensor]:
    """Move what was predicted for the pixels of each view back to the pixels of the image.

    Args:
        masks: The predictions of the views of `make_views`, (N, C, H, W).
        views: As in `make_views`.

    Returns:
        The predictions (N, C, H, W). Pixels that a shifted view does not have get those of the unshifted images.
    """
    count = len(masks) // 2 if "flip" in views else len(masks)
    mirrored = [mask.flip(-1) for mask in masks[count:]]
    found = [*_undo_shifts(masks[:count])]
    return found + _undo_shifts(mirrored) if mirrored else found


def _undo_shifts(masks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Undo `_shifts` for the predictions of an image, the first one, and of its shifted views, if there are any."""
    first, *shifted = masks
    if not shifted:
        return [first]
    height, width = first.shape[-2:]
    pixels = max(1, min(height, width) // 8)
    found = [first]
    corners = [(top, left) for top in (0, 2 * pixels) for left in (0, 2 * pixels)]
    for mask, (top, left) in zip(shifted, corners, strict=True):
        aligned = first.clone()  # row r of the view is row r + top - pixels of the image
        rows, view_rows = _overlap(height, top - pixels)
        columns, view_columns = _overlap(width, left - pixels)
        aligned[..., rows, columns] = mask[..., view_rows, view_columns]
        found.append(aligned)
    return found


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """Return the pixels of an image that a view shifted by `offset` has, and their positions in the view."""
    return slice(max(0, offset), size + min(0, offset)), slice(max(0, -offset), size - max(0, offset))
